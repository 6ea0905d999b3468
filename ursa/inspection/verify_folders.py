"""Verify the directories that records name: exported models, tokenizers and checkpoints."""

import json
from collections.abc import Iterator

from safetensors import SafetensorError, safe_open

from ursa import storage
from ursa.artifacts import CheckpointRef, ExportedModel, TokenizerRef
from ursa.inspection.problems import ProblemKind, Tally, remake_hint
from ursa.inspection.root import MANIFEST_NAME, list_below

CHECKPOINTS = "checkpoints"
"""Folder of the stages."""
MERGED = "merged"
"""Folder of whole networks with adapters in them, laid out like that of the stages."""
_NEEDED = {"visual": "config.json", "text": "tokenizer.json"}


def verify_model(tally: Tally, model: ExportedModel, *, with_media: bool) -> None:
    """Compare the files of an exported model with the hashes in its record.

    Args:
        tally: Collects counts and problems.
        model: The record.
        with_media: Read every file; else they only must be there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    hint = (
        f"put it back from a copy, or delete {model.manifest_uri} and run the pipeline again, "
        "which exports the model anew from its checkpoint"
    )
    _verify_files(tally, model.directory_uri, model.sha256, hint, with_media=with_media)


def _verify_files(
    tally: Tally, folder_uri: str, hashes: dict[str, str], hint: str, *, with_media: bool
) -> None:
    sizes = _sizes(folder_uri)
    for name, sha256 in sorted(hashes.items()):
        uri = storage.join(folder_uri, name)
        detail = None if name in sizes else "it is missing"
        if detail is None and with_media:
            detail = _damage_of_large(uri, sha256)
        if detail is not None:
            tally.add(ProblemKind.CONTENT, uri, detail, hint)
        else:
            tally.num_files += 1
            tally.num_bytes += sizes[name]


def verify_tokenizer(tally: Tally, tokenizer: TokenizerRef, *, with_media: bool) -> None:
    """Compare the files of a tokenizer with the hashes in its record.

    Where it has none, as those of older releases, files must be there and can be read.

    Args:
        tally: Collects counts and problems.
        tokenizer: The record.
        with_media: Read the weights too; else they only must be there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    hint = (
        "put it back from a copy, if there is one: what was tokenized and trained with it needs "
        f"these very bytes; else delete {tokenizer.manifest_uri} and run the pipeline again"
    )
    if tokenizer.sha256:
        _verify_files(tally, tokenizer.directory_uri, tokenizer.sha256, hint, with_media=with_media)
        return
    sizes = _sizes(tokenizer.directory_uri)
    bad = dict(_tokenizer_errors(tokenizer, sizes, with_media=with_media))
    for name, detail in bad.items():
        uri = storage.join(tokenizer.directory_uri, name)
        tally.add(ProblemKind.CONTENT, uri, detail, hint)
    tally.num_files += len(sizes.keys() - bad.keys())
    tally.num_bytes += sum(size for name, size in sizes.items() if name not in bad)


def _tokenizer_errors(
    tokenizer: TokenizerRef, sizes: dict[str, int], *, with_media: bool
) -> Iterator[tuple[str, str]]:
    """Yield the names of bad files of a tokenizer without hashes, with what is wrong."""
    needed = {_NEEDED[tokenizer.kind]}
    for name in sorted(name for name in sizes if name.endswith(".json")):
        try:
            values = json.loads(storage.read_bytes(storage.join(tokenizer.directory_uri, name)))
            if name.endswith(".index.json"):
                needed |= set(values["weight_map"].values())
        except FileNotFoundError:
            yield name, "it is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield name, f"it cannot be read: {error}"
    weights = sorted(name for name in sizes if name.endswith(".safetensors"))
    if tokenizer.kind == "visual" and not weights:
        yield "*.safetensors", "its weights are missing"
    for name in sorted(needed - sizes.keys()):
        yield name, "it is missing"
    for name in weights if with_media else ():
        try:
            with (
                storage.local_copy(storage.join(tokenizer.directory_uri, name)) as path,
                safe_open(path, framework="numpy"),  # header and length must fit
            ):
                pass
        except FileNotFoundError:
            yield name, "it is missing"
        except SafetensorError as error:
            yield name, f"it cannot be read: {error}"


def verify_checkpoint(
    tally: Tally, marker_uri: str, state_uri: str, sha256: str, *, with_media: bool
) -> None:
    """Compare the state of a checkpoint with the hash in its marker.

    Args:
        tally: Collects counts and problems.
        marker_uri: What makes it committed.
        state_uri: Its state.
        sha256: What the marker says of it.
        with_media: Read the state; else it only must be there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    detail = None if storage.exists(state_uri) else "it is missing"
    if detail is None and with_media:
        detail = _damage_of_large(state_uri, sha256)
    if detail is None:
        tally.num_files += 1
    elif storage.exists(marker_uri):  # else a training has removed it, which has a newer one
        tally.add(ProblemKind.CONTENT, state_uri, detail, checkpoint_hint(marker_uri))


def checkpoint_hint(marker_uri: str) -> str:
    """Return what to do about a damaged checkpoint.

    Args:
        marker_uri: What makes it committed.
    """
    folder_uri = marker_uri.rpartition("/")[0]
    root_uri, _, stage, name, _ = folder_uri.rsplit("/", 4)
    manifest_uri = storage.join(root_uri, CHECKPOINTS, stage, name, MANIFEST_NAME)
    return (
        f"put it back from a copy, or delete {folder_uri} and, if it is there, {manifest_uri}: "
        "a run that needs the stage goes on from the checkpoint before"
    )


def verify_stage(tally: Tally, uri: str, checkpoint: CheckpointRef, marker_name: str) -> None:
    """Look whether the checkpoints that the record of a finished stage names are committed.

    Args:
        tally: Collects counts and problems.
        uri: Where the record is.
        checkpoint: The record.
        marker_name: File that a committed checkpoint holds.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if not tally.is_in_place(uri, storage.join(checkpoint.uri.rpartition("/")[0], MANIFEST_NAME)):
        return
    for folder_uri in dict.fromkeys((checkpoint.uri, checkpoint.weights_uri)):
        marker_uri = storage.join(folder_uri, marker_name)
        if not storage.exists(marker_uri):
            detail = f"it is missing; {uri} names its folder"
            tally.add(ProblemKind.CONTENT, marker_uri, detail, remake_hint(uri))


def _sizes(folder_uri: str) -> dict[str, int]:
    """Return bytes by the names of the files below a folder."""
    place = storage.absolute_uri(folder_uri).rstrip("/") + "/"
    return {
        storage.absolute_uri(item.uri).removeprefix(place): item.num_bytes
        for item in list_below(folder_uri)
    }


def _damage_of_large(uri: str, sha256: str) -> str | None:
    """Like `storage.damage_of`, of a file that memory may not hold."""
    try:
        with storage.local_copy(uri) as path:
            found = storage.sha256_file(path)
    except FileNotFoundError:
        return "it is missing"
    return None if found == sha256 else f"sha256 is {found[:16]}..., expected {sha256[:16]}..."
