from pathlib import Path

import pytest

from tests import data_roots, factories
from ursa import storage
from ursa.inspection.problems import Tally
from ursa.inspection.verify_records import verify_records
from ursa.release import export_model
from ursa.training.stage import train_stage


@pytest.fixture
def trained(tmp_path, tiny_data):
    """A root with a model, its checkpoint and both tokenizers; nothing else is in it."""
    uri = str(tmp_path / "data")
    request = factories.stage_request(tiny_data, "video_pretrain", uri, max_steps=1)
    export_model(request, train_stage(request), output_uri=uri)
    visual = data_roots.commit_tokenizer(uri, tmp_path)
    text = tiny_data.text_tokenizer
    place = f"{uri}/tokenizers/text/{'1' * 32}"
    storage.upload_directory(storage.local_path(text.directory_uri), f"{place}/model")
    values = {"manifest_uri": f"{place}/manifest.json", "directory_uri": f"{place}/model"}
    text = text.model_copy(update=values)
    storage.commit_record(text.manifest_uri, text)
    return Path(uri), (visual, text)


def look(uri, **options):
    tally = Tally(str(uri))
    verify_records(tally, {}, **{"with_media": False, **options})
    return tally.result()


def names(found):
    return {storage.local_path(problem.uri) for problem in found.problems}


def folder_files(uri):
    """What the records of models, checkpoints and tokenizers name."""
    found = [path for path in uri.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return [path for path in found if path.relative_to(uri).parts[0] != "samples"]


def test_whole_folders_have_no_problem(trained):
    uri, _ = trained
    assert look(uri, with_media=True).problems == ()
    found = look(uri)
    assert found.problems == ()
    assert found.not_checked == (
        "the bytes of 1 models (--media reads them)",
        "the bytes of 2 tokenizers (--media reads them)",
        "the bytes of 1 checkpoints (--media reads them)",
    )
    assert found.num_files > 8
    assert found.num_bytes > 10_000


def test_every_lost_file_is_found_without_reading_them(trained):
    uri, _ = trained
    paths = folder_files(uri)
    assert {"config.json", "model.safetensors", "tokenizer.json", "COMMITTED.json"} <= {
        path.name for path in paths
    }
    for path in paths:
        data = path.read_bytes()
        path.unlink()
        (problem,) = look(uri).problems
        assert storage.local_path(problem.uri) == path
        assert "missing" in problem.detail
        assert "delete" in problem.repair
        path.write_bytes(data)


def test_a_flipped_bit_of_a_model_tokenizer_or_checkpoint_is_found(trained):
    uri, _ = trained
    assert {"tokenizers", "models", "checkpoints"} <= {
        part for path in folder_files(uri) for part in path.parts
    }
    for path in folder_files(uri):
        place = path.stat().st_size // 2
        data_roots.flip_bit(path, place, 3)
        assert names(look(uri, with_media=True)) == {path}
        data_roots.flip_bit(path, place, 3)


def test_files_of_tokenizers_without_hashes_must_be_there_and_open(trained):
    uri, (visual, text) = trained
    for record in (visual, text):
        storage.remove_file(record.manifest_uri)
        storage.commit_record(record.manifest_uri, record.model_copy(update={"sha256": {}}))
    found = look(uri, with_media=True)
    assert found.problems == ()
    assert found.not_checked == ("every bit of 2 tokenizers: no hash of their files is recorded",)
    optional = storage.local_path(text.directory_uri) / "tokenizer_config.json"
    for path in folder_files(uri):
        if "tokenizers" not in path.parts:
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-5])
        assert names(look(uri, with_media=True)) == {path}
        path.unlink()
        expected = path.with_name("*.safetensors") if path.suffix == ".safetensors" else path
        assert names(look(uri)) == ({expected} if path != optional else set())
        path.write_bytes(data)


def test_a_checkpoint_that_training_removes_meanwhile_is_no_damage(trained, monkeypatch):
    uri, _ = trained
    (state,) = uri.glob("checkpoints/*/*/*/state.safetensors")
    (record,) = uri.glob("checkpoints/*/*/manifest.json")
    record.unlink()
    exists = storage.exists

    def late(place):
        for path in (state, state.with_name("COMMITTED.json")):
            path.unlink(missing_ok=True)
        return exists(place)

    monkeypatch.setattr(storage, "exists", late)
    assert look(uri).problems == ()
    assert not state.exists()


def test_weights_with_adapters_in_them_are_looked_at(tmp_path, tiny_data, exported_model):
    request = factories.stage_request(
        tiny_data,
        "video_pretrain",
        str(tmp_path),
        init_from_uri=exported_model.directory_uri,
        max_steps=1,
        lora={"rank": 2},
    )
    merged = storage.local_path(train_stage(request).merged_uri)
    assert look(tmp_path, with_media=True).problems == ()
    data_roots.flip_bit(merged / "state.safetensors", 5000, 1)
    (problem,) = look(tmp_path, with_media=True).problems
    assert storage.local_path(problem.uri) == merged / "state.safetensors"
    (manifest,) = tmp_path.glob("checkpoints/*/*/manifest.json")
    assert f"delete {merged} and, if it is there, {manifest}: " in problem.repair.replace(
        "file://", ""
    )
    (merged / "COMMITTED.json").unlink()
    (problem,) = look(tmp_path).problems
    assert storage.local_path(problem.uri) == merged / "COMMITTED.json"
