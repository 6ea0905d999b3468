from pathlib import Path

import pytest

from tests import data_roots
from ursa import storage
from ursa.data.versions import commit_version
from ursa.inspection.repair import repair_root
from ursa.inspection.verify import verify_root


def hashes(root):
    return {uri: etag for uri, (etag, _) in root.files().items()}


def flip(path):
    data_roots.flip_bit(path, path.stat().st_size // 2, 0)


def test_damaged_records_are_removed_and_nothing_else(records):
    root, before = records.root, records.root.files()
    damaged = [records.units()[0], records.annotations[1]]
    for path in damaged:
        flip(path)
    report = repair_root(root.uri)
    assert report.num_left == 0
    assert {storage.local_path(repair.uri) for repair in report.repairs} == set(damaged)
    after = root.files()
    assert set(before) - set(after) == {path.as_uri() for path in damaged}
    assert {uri: before[uri] for uri in after} == after
    assert verify_root(root.uri, with_media=True).problems == ()


def test_the_next_run_makes_removed_units_again(records):
    root, before = records.root, hashes(records.root)
    flip(records.units()[0])
    assert repair_root(root.uri).num_left == 0
    # a new file makes another set of clips, for which the unit is needed
    data = (root.source / "pan.mp4").read_bytes()
    (root.source / "another.mp4").write_bytes(data + b"\0\0\0\x08free")
    data_roots.prepare(root.source, root.uri, root.config, records.versions[0].visual_tokenizer)
    assert before.items() <= hashes(root).items()
    assert verify_root(root.uri, with_media=True).problems == ()


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_tables_of_versions_come_out_the_same(records, damage):
    root, before = records.root, hashes(records.root)
    tables = {Path(uri) for v in records.versions for uri in (v.files_uri, v.changes_uri)}
    for path in tables:
        path.unlink() if damage == "missing" else flip(path)
    report = repair_root(root.uri)
    assert report.num_left == 0
    assert {Path(repair.uri) for repair in report.repairs} == tables
    assert hashes(root) == before


def test_a_damaged_version_is_left_with_what_to_do(records):
    root, (one, two) = records.root, records.versions
    flip(Path(two.manifest_uri))
    before = root.files()
    (repair,) = repair_root(root.uri).repairs
    assert not repair.is_repaired
    assert storage.local_path(repair.uri) == Path(two.manifest_uri)
    assert "put it back from a copy" in repair.detail
    assert root.files() == before
    # and runs go on after it
    tokenizers = (two.visual_tokenizer, two.text_tokenizer)
    new = commit_version(root.uri, root.config, root.selection, tokenizers, root.datasets, code={})
    assert (new.number, new.parent_uri) == (3, one.manifest_uri)


def test_tables_of_a_version_whose_clips_are_lost_are_left(records):
    two = records.versions[1]
    Path(two.changes_uri).unlink()
    Path(two.files_uri).unlink()
    Path(two.clips.clips_uri).unlink()
    report = repair_root(records.root.uri)
    left = {repair.uri: repair.detail for repair in report.repairs if not repair.is_repaired}
    assert "it cannot be made again" in left[two.files_uri]
    assert two.clips.clips_uri in left[two.files_uri]
    assert two.clips.clips_uri in left


def test_a_record_that_was_read_by_halves_is_not_removed(records, monkeypatch):
    """The look that found it damaged was wrong."""
    path = records.units()[0]
    before, read, cut = path.read_bytes(), storage.read_bytes, []

    def once(uri):
        data = read(uri)
        if storage.local_path(uri) == path and len(cut) < 2:
            cut.append(uri)
            return data[:50]
        return data

    monkeypatch.setattr(storage, "read_bytes", once)
    report = repair_root(records.root.uri)
    assert len(cut) == 2
    assert [storage.local_path(repair.uri) for repair in report.repairs] == [path]
    assert path.read_bytes() == before


def test_a_record_that_another_repair_has_just_removed(records, monkeypatch):
    path, remove = records.units()[0], storage.remove_file
    flip(path)

    def late(uri):
        if storage.local_path(uri) == path:
            path.unlink()
        remove(uri)

    monkeypatch.setattr(storage, "remove_file", late)
    report = repair_root(records.root.uri)
    assert report.num_left == 0
    assert [storage.local_path(repair.uri) for repair in report.repairs] == [path]
    assert not path.exists()
