"""Broken variants of the protocols: what the fault tests are there to find."""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ursa import ingestion, storage, tokenization
from ursa.data import clips, shards, versions
from ursa.data.units import TokenizedUnit
from ursa.errors import ClipUnavailableError, UrsaError, VideoDecodeError
from ursa.training import checkpoint, stage

Apply = Callable[[pytest.MonkeyPatch], None]


class Mutant(NamedTuple):
    """A way to break the library, and the scenario that must notice."""

    name: str
    scenario: str
    apply: Apply


def _unconditional_put(patch: pytest.MonkeyPatch) -> None:
    def put(uri: str, data: bytes) -> bytes:
        storage.write_bytes(uri, data)
        return data

    patch.setattr(storage, "put_if_absent", put)


def _taken_is_an_error(patch: pytest.MonkeyPatch) -> None:
    def put(uri: str, data: bytes) -> bytes:
        storage._s3_call("_pipe_file", uri, data, mode="create", **storage._transfer(len(data)))
        return data

    patch.setattr(storage, "put_if_absent", put)


def _loser_keeps_its_own(patch: pytest.MonkeyPatch) -> None:
    put = storage.put_if_absent

    def put_and_forget(uri: str, data: bytes) -> bytes:
        put(uri, data)
        return data

    patch.setattr(storage, "put_if_absent", put_and_forget)


def _look_then_write(patch: pytest.MonkeyPatch) -> None:
    def put(uri: str, data: bytes) -> bytes:
        if storage.exists(uri):
            return storage.read_bytes(uri)
        storage.write_bytes(uri, data)
        return data

    patch.setattr(storage, "put_if_absent", put)


def _no_repetition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "BUSY_BUDGET_S", 0.0)

    def put(uri: str, data: bytes) -> bytes:  # a lost answer is taken for "not written"
        try:
            storage._s3_call("_pipe_file", uri, data, mode="create", **storage._transfer(len(data)))
        except storage.StorageError:
            other = f"{uri}-{secrets.token_hex(2)}"
            storage.write_bytes(other, data)
        except FileExistsError:
            return storage.read_bytes(uri)
        return data

    patch.setattr(storage, "put_if_absent", put)


def _endless_repetition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "BUSY_BUDGET_S", 600.0)


def _raw_errors(patch: pytest.MonkeyPatch) -> None:
    transient = storage._transient

    def explain(error: Exception, deadline_s: float) -> Exception:
        found = transient(error, deadline_s)
        return error if "IncompleteRead" in type(error).__name__ else found

    patch.setattr(storage, "_transient", explain)


def _marker_first(patch: pytest.MonkeyPatch) -> None:
    later: list[tuple[str, bytes]] = []
    commit = storage.commit_record

    def upload_later(path: Any, uri: str) -> None:
        later.append((uri, path.read_bytes()))

    def commit_first(uri: str, record: Any) -> Any:
        after, later[:] = later[:], []
        done = commit(uri, record)
        for upload in after:
            storage.write_bytes(*upload)
        return done

    patch.setattr(storage, "upload_file", upload_later)
    patch.setattr(storage, "commit_record", commit_first)


def _same_folder_for_a_step(patch: pytest.MonkeyPatch) -> None:
    class Always:
        token_hex = staticmethod(lambda _: "0" * 8)

    patch.setattr(checkpoint, "secrets", Always)


def _same_folder_for_a_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "unique_place", storage.join)


def _old_checkpoints_first(patch: pytest.MonkeyPatch) -> None:
    save = stage.save_checkpoint

    def remove_and_save(state: Any, stage_uri: str, **options: Any) -> str:
        storage.remove_directory(stage_uri)
        return save(state, stage_uri, **options)

    patch.setattr(stage, "save_checkpoint", remove_and_save)


def _state_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    def unchecked(folder_uri: str) -> Any:
        marker = storage.load_record(
            storage.join(folder_uri, checkpoint.MARKER_FILE), checkpoint.CheckpointMarker
        )
        with storage.local_copy(storage.join(folder_uri, checkpoint.STATE_FILE)) as path:
            return marker, checkpoint.load_file(path)

    _size_is_not_checked(patch)
    patch.setattr(checkpoint, "load_checkpoint", unchecked)
    patch.setattr(stage, "load_checkpoint", unchecked)


def _clip_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def unchecked(clip: clips.Clip) -> Iterator[Path]:
        try:
            with storage.local_copy(clip.media_uri) as path:
                yield path
        except FileNotFoundError as error:
            missing = f"{clip.media_uri} is missing; run `ursa data repair`"
            raise ClipUnavailableError(missing) from error

    _size_is_not_checked(patch)
    patch.setattr(tokenization, "local_clip", unchecked)


def _size_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    def download(uri: str, target: Path, num_bytes: int) -> None:
        storage._s3_call("_get_file", uri, str(target), **storage._transfer(num_bytes))

    patch.setattr(storage, "_download", download)


def _background_fails_in_silence(patch: pytest.MonkeyPatch) -> None:
    wait = checkpoint.CheckpointWriter.wait

    def wait_in_silence(writer: checkpoint.CheckpointWriter) -> str:
        try:
            return wait(writer)
        except UrsaError:
            return writer._uri

    patch.setattr(checkpoint.CheckpointWriter, "wait", wait_in_silence)


def _last_save_is_not_awaited(patch: pytest.MonkeyPatch) -> None:
    def finish(run: Any) -> str:
        return run._writer._uri or run._resumed_uri

    patch.setattr(stage._StageRun, "finish", finish)


def _number_is_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """The loser of a number takes its own version for committed."""
    commit = storage.commit_record

    def commit_and_forget(uri: str, record: Any) -> Any:
        found = commit(uri, record)
        return record if isinstance(record, versions.DatasetVersion) else found

    patch.setattr(storage, "commit_record", commit_and_forget)


def _loser_skips_a_number(patch: pytest.MonkeyPatch) -> None:
    commit = storage.commit_record

    def commit_elsewhere(uri: str, record: Any) -> Any:
        if not isinstance(record, versions.DatasetVersion) or commit(uri, record) == record:
            return record if isinstance(record, versions.DatasetVersion) else commit(uri, record)
        folder_uri, number = uri.rpartition("/")[0], record.number + 1
        moved = {"number": number, "manifest_uri": versions._manifest_uri(folder_uri, number)}
        return commit_elsewhere(moved["manifest_uri"], record.model_copy(update=moved))

    patch.setattr(storage, "commit_record", commit_elsewhere)


def _same_version_again(patch: pytest.MonkeyPatch) -> None:
    """That the newest version is the same is not noticed."""
    newest = versions._newest_and_next

    def other(folder_uri: str) -> Any:
        found, number = newest(folder_uri)
        return found and found.model_copy(update={"fingerprint": ""}), number

    patch.setattr(versions, "_newest_and_next", other)


def _no_resume(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stage, "latest_checkpoint", lambda *_, **__: None)


def _manifest_before_directory(patch: pytest.MonkeyPatch) -> None:
    upload = storage.upload_directory

    def forget_the_last(folder: Any, uri: str) -> dict[str, str]:
        hashes = {
            path.relative_to(folder).as_posix(): storage.sha256_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        later.append((folder, uri))
        return hashes

    commit = storage.commit_record

    def commit_then_upload(uri: str, record: Any) -> Any:
        after, later[:] = later[:], []
        done = commit(uri, record)
        for directory in after:
            upload(*directory)
        return done

    later: list[tuple[Any, str]] = []
    patch.setattr(storage, "upload_directory", forget_the_last)
    patch.setattr(storage, "commit_record", commit_then_upload)


def _no_unit_record(patch: pytest.MonkeyPatch) -> None:
    commit = storage.commit_record

    def skip(uri: str, record: Any) -> Any:
        return record if isinstance(record, TokenizedUnit) else commit(uri, record)

    patch.setattr(storage, "commit_record", skip)


def _no_video_record(patch: pytest.MonkeyPatch) -> None:
    commit = storage.commit_record

    def skip(uri: str, record: Any) -> Any:
        is_unit = isinstance(record, ingestion.IngestedVideo)
        return record if is_unit else commit(uri, record)

    patch.setattr(storage, "commit_record", skip)


def _record_before_shards(patch: pytest.MonkeyPatch) -> None:
    later: list[tuple[str, bytes]] = []
    put, commit = storage.put_named_by_hash, storage.commit_record

    def put_later(uri: str, data: bytes) -> None:
        later.append((uri, data))

    def commit_then_put(uri: str, record: Any) -> Any:
        after, later[:] = later[:], []
        done = commit(uri, record)
        for shard in after:
            put(*shard)
        return done

    patch.setattr(storage, "put_named_by_hash", put_later)
    patch.setattr(storage, "commit_record", commit_then_put)


def _manifest_lists_the_folder(patch: pytest.MonkeyPatch) -> None:
    dataset = tokenization._dataset

    def listed(address: tuple[Any, ...], *rest: Any) -> Any:
        found = dataset(address, *rest)
        if not found.shards:
            return found
        folder = found.shards[0].uri.rpartition("/")[0]
        infos = []
        for item in storage.list_files(folder):
            if f"/{address[0]}-" in item.uri:
                data = storage.read_bytes(item.uri)
                file = shards.pq.ParquetFile(shards.pa.BufferReader(data))
                rows = file.metadata.num_rows
                digest = shards.hashlib.sha256(data).hexdigest()
                infos.append(
                    shards.ShardInfo(
                        uri=item.uri, num_samples=rows, num_bytes=len(data), sha256=digest
                    )
                )
        return found.model_copy(update={"shards": tuple(infos)})

    patch.setattr(tokenization, "_dataset", listed)


def _random_shard_names(patch: pytest.MonkeyPatch) -> None:
    write = tokenization.write_shard

    def write_anywhere(rows: Any, uri_prefix: str, **options: Any) -> Any:
        return write(rows, f"{uri_prefix}-{secrets.token_hex(4)}", **options)

    patch.setattr(tokenization, "write_shard", write_anywhere)


def _names_without_hash(patch: pytest.MonkeyPatch) -> None:
    def write(rows: Any, uri_prefix: str, *, codebook_size: int) -> Any:
        data = shards.shard_bytes(rows, codebook_size=codebook_size)
        storage.write_bytes(f"{uri_prefix}.parquet", data)
        digest = shards.hashlib.sha256(data).hexdigest()
        return shards.ShardInfo(
            uri=f"{uri_prefix}.parquet",
            num_samples=len(rows),
            num_bytes=len(data),
            sha256=digest,
        )

    patch.setattr(tokenization, "write_shard", write)


def _table_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    def read(uri: str, _schema: Any, _num_rows: int, columns: Any = None) -> Any:
        file = clips.pq.ParquetFile(clips.pa.BufferReader(storage.read_bytes(uri)))
        return file.read(columns)

    patch.setattr(clips, "read_table", read)


def _upload_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Media go up only after the record of their video."""
    later: list[tuple[bytes, str]] = []
    commit = storage.commit_record

    def upload_later(path: Any, uri: str) -> None:
        later.append((path.read_bytes(), uri))

    def commit_then_upload(uri: str, record: Any) -> Any:
        after, later[:] = later[:], []
        done = commit(uri, record)
        for data, media_uri in after:
            storage.write_bytes(media_uri, data)
        return done

    patch.setattr(storage, "upload_file", upload_later)
    patch.setattr(storage, "commit_record", commit_then_upload)


def _failures_are_dropped(patch: pytest.MonkeyPatch) -> None:
    commit = ingestion.commit_clips

    def without_failures(source_uri: str, videos: Any, *rest: Any) -> Any:
        whole = [video for video in videos if video.failure is None]
        return commit(source_uri, whole, *rest)

    patch.setattr(ingestion, "commit_clips", without_failures)


def _manifest_of_todo_alone(patch: pytest.MonkeyPatch) -> None:
    plan = tokenization.plan_tokenization

    def forget_done(*arguments: Any, **options: Any) -> Any:
        return plan(*arguments, **options)._replace(done=())

    patch.setattr(tokenization, "plan_tokenization", forget_done)


def _fingerprint_with_a_clock(patch: pytest.MonkeyPatch) -> None:
    plan = ingestion.plan_ingestion

    def clocked(*arguments: Any) -> Any:
        found = plan(*arguments)
        return found._replace(fingerprint=secrets.token_hex(32))

    patch.setattr(ingestion, "plan_ingestion", clocked)


def _trouble_is_a_bad_clip(patch: pytest.MonkeyPatch) -> None:
    """An error of the store counts as a clip that cannot be read."""
    read = tokenization.read_clip

    def read_or_not(*arguments: Any) -> Any:
        try:
            return read(*arguments)
        except storage.StorageError as error:
            raise VideoDecodeError(str(error)) from error

    patch.setattr(tokenization, "read_clip", read_or_not)


MUTANTS = (
    Mutant("a put overwrites", "tokenization", _unconditional_put),
    Mutant("a put overwrites a model record", "release", _unconditional_put),
    Mutant("a taken name is an error", "tokenization", _taken_is_an_error),
    Mutant("the loser keeps its own record", "tokenization", _loser_keeps_its_own),
    Mutant("look, then write", "tokenization", _look_then_write),
    Mutant("a lost answer is taken for not written", "ingestion", _no_repetition),
    Mutant("calls are repeated for ten minutes", "ingestion", _endless_repetition),
    Mutant("errors of the client come through", "ingestion", _raw_errors),
    Mutant("the marker goes before the state", "training", _marker_first),
    Mutant("checkpoints of a step share a folder", "training", _same_folder_for_a_step),
    Mutant("models share a folder", "release", _same_folder_for_a_model),
    Mutant("old checkpoints go before the new one is there", "training", _old_checkpoints_first),
    Mutant("what is read of a state is not checked", "training", _state_is_not_checked),
    Mutant("what arrives of a clip is not checked", "tokenization", _clip_is_not_checked),
    Mutant("a save in the background fails in silence", "training", _background_fails_in_silence),
    Mutant("the last save is not waited for", "training", _last_save_is_not_awaited),
    Mutant("a number is taken twice", "versions", _number_is_taken_twice),
    Mutant("the loser of a number takes the next", "versions", _loser_skips_a_number),
    Mutant("the same version again", "versions", _same_version_again),
    Mutant("a version overwrites another", "versions", _unconditional_put),
    Mutant("a decision overwrites another", "decisions", _unconditional_put),
    Mutant("a stage begins anew", "training", _no_resume),
    Mutant("the record goes before the directory", "release", _manifest_before_directory),
    Mutant("no record of a unit", "tokenization", _no_unit_record),
    Mutant("no record of a video", "ingestion", _no_video_record),
    Mutant("the record goes before the shards", "tokenization", _record_before_shards),
    Mutant("the manifest lists the folder", "tokenization", _manifest_lists_the_folder),
    Mutant("shards have random names", "tokenization", _random_shard_names),
    Mutant("names of shards hold no hash", "tokenization", _names_without_hash),
    Mutant("the hash of a table is not checked", "ingestion", _table_is_not_checked),
    Mutant("the record goes before the clips", "ingestion", _upload_is_forgotten),
    Mutant("failures are dropped", "ingestion", _failures_are_dropped),
    Mutant("the manifest forgets earlier units", "tokenization", _manifest_of_todo_alone),
    Mutant("a fingerprint with a clock", "ingestion", _fingerprint_with_a_clock),
    Mutant("trouble of the store counts as a bad clip", "tokenization", _trouble_is_a_bad_clip),
)


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Break the library for a while."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)
        yield
