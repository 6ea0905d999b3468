import threading
from pathlib import Path

import pytest

from tests import data_roots, factories
from ursa import storage
from ursa.data.units import TokenizedUnit
from ursa.errors import UrsaError
from ursa.inspection.repair import repair_root
from ursa.inspection.root import read_recipe
from ursa.inspection.verify import verify_root


def hashes(root):
    return {uri: etag for uri, (etag, _) in root.files().items()}


def test_damaged_and_missing_shards_are_made_again_and_nothing_else(root):
    before = root.files()
    damaged = root.shards()[:2]
    damaged[0].unlink()
    data_roots.flip_bit(damaged[1], 77, 2)
    report = repair_root(root.uri)
    assert {repair.uri for repair in report.repairs} == {str(path) for path in damaged}
    assert report.num_left == 0
    after = root.files()
    assert {uri: etag for uri, (etag, _) in after.items()} == {
        uri: etag for uri, (etag, _) in before.items()
    }
    written = {uri for uri in after if after[uri] != before[uri]}
    assert written == {path.as_uri() for path in damaged}
    assert verify_root(root.uri, with_media=True).problems == ()


def test_nothing_is_done_to_a_whole_root(root):
    before = root.files()
    assert repair_root(root.uri).repairs == ()
    assert root.files() == before


def test_clips_come_from_their_source_and_shards_from_the_clips(root):
    before = hashes(root)
    data_roots.flip_bit(root.media()[0], 500, 1)
    for path in (root.media()[1], *root.shards()):
        path.unlink()
    report = repair_root(root.uri, config=root.config)
    assert report.num_left == 0
    assert len(report.repairs) == 2 + len(root.shards())
    assert hashes(root) == before


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_clip_without_its_source_is_left_with_its_shards(root, what):
    clip = next(iter(root.media()))
    clip.unlink()
    for path in root.shards():
        path.unlink()
    for video in root.source.glob("*.mp4"):
        if what == "gone":
            video.unlink()
        else:
            video.write_bytes(video.read_bytes() + b"x")
    report = repair_root(root.uri, config=root.config)
    detail = {repair.uri: repair.detail for repair in report.repairs if not repair.is_repaired}
    assert ("is gone; put it back" if what == "gone" else "it has changed") in detail[str(clip)]
    lost = [uri for uri, text in detail.items() if f"its clip {clip} is damaged" in text]
    assert len(lost) == 2  # image and video of one unit
    assert len(report.repairs) - report.num_left == len(root.shards()) > 0  # those of the others


def test_clips_are_made_with_the_configuration_of_their_set(root):
    """No preset has it, and one that is named does not matter to them."""
    lost = root.media()[0]
    data = lost.read_bytes()
    lost.unlink()
    other = factories.tiny_config({"ingestion": {"clip_height_px": 64, "clip_fps": 12.0}})
    (repair,) = repair_root(root.uri, config=other).repairs
    assert repair.is_repaired
    assert lost.read_bytes() == data


def test_bytes_that_come_out_differently_are_not_written(root, tmp_path):
    """A tokenizer with other weights stands for another processor."""
    before, shards = hashes(root), root.shards()
    for path in shards:
        path.unlink()
    data_roots.commit_tokenizer(root.uri, tmp_path, seed=1)
    report = repair_root(root.uri)
    assert report.num_left == len(report.repairs) == len(shards) + 1 > 1
    assert "has other bytes" in report.repairs[0].detail
    assert report.repairs[-1].uri.endswith("/model.safetensors")
    assert root.shards() == []
    assert len(before) == len(hashes(root)) + len(shards)


def test_without_its_record_a_unit_is_made_again(root):
    """Its hash proves that no clip had failed."""
    before = hashes(root)
    shard = root.shards()[0]
    shard.unlink()
    for path in (Path(root.uri) / "tokens" / "units").iterdir():
        record = storage.load_record(str(path), TokenizedUnit)
        if any(str(shard) == part.uri for part in (record.image, record.video) if part):
            path.unlink()
            gone = path
    report = repair_root(root.uri)
    assert [repair.uri for repair in report.repairs if repair.is_repaired] == [str(shard)]
    assert set(before) - set(hashes(root)) == {gone.as_uri()}
    assert report.num_left == 1


def test_two_repairs_at_once_are_harmless(root):
    before = hashes(root)
    for path in root.shards():
        data_roots.flip_bit(path, 99, 4)
    failed = []

    def work():
        try:
            failed.extend(r for r in repair_root(root.uri).repairs if not r.is_repaired)
        except UrsaError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not any(thread.is_alive() for thread in threads)
    assert hashes(root) == before


def test_a_data_set_without_a_clip_that_was_away_is_whole_in_itself(root):
    """Its unit has no record of its own, so the next run makes it again with the clip."""
    values = {**root.config.tokenization.model_dump(), "max_failed_fraction": 0.9, "fps": 6.0}
    config = data_roots.root_config(tokenization=values)
    tokenizer = read_recipe(root.datasets).visual_tokenizer
    lost = root.media()[0]
    content = lost.read_bytes()
    lost.unlink()
    without = data_roots.prepare(root.source, root.uri, config, tokenizer).datasets
    assert without.num_unavailable_clips == 1
    lost.write_bytes(content)
    assert verify_root(root.uri, with_media=True).problems == ()
    shards = {storage.local_path(s.uri) for part in without.parts() for s in part.shards}
    before = {path: path.read_bytes() for path in shards}
    for path in shards:
        path.unlink()
    assert repair_root(root.uri).num_left == 0
    assert {path: path.read_bytes() for path in shards} == before
    whole = data_roots.prepare(root.source, root.uri, config, tokenizer).datasets
    assert whole.num_unavailable_clips == 0
    assert verify_root(root.uri, with_media=True).problems == ()
