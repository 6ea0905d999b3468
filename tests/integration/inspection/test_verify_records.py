import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import data_roots
from ursa import storage
from ursa.annotation.records import AnnotationReport
from ursa.annotation.units import REPORT_NAME
from ursa.artifacts import SourceVideo
from ursa.cli import main
from ursa.decisions import record_decision
from ursa.inspection.problems import ProblemKind, Tally
from ursa.inspection.verify import verify_root
from ursa.inspection.verify_records import verify_records
from ursa.sources.committed import SourceListing, commit_listing

NOT_READ = "the bytes of 1 tokenizers (--media reads them)"


def look(root):
    """What is wrong with the records alone."""
    tally = Tally(root.uri)
    verify_records(tally, {clip.as_posix(): "" for clip in root.media()}, with_media=False)
    return tally.result()


def without_hash(path, change=lambda _: None):
    """Write a record as older code did, with something changed."""
    values = json.loads(path.read_text("utf-8"))
    del values["sha256"]
    change(values["record"])
    path.write_text(json.dumps(values), "utf-8")


def test_all_records_are_looked_at(records):
    found = verify_root(records.root.uri, with_media=True)
    assert found.problems == ()
    assert found.not_checked == ()
    assert found.num_versions == 2
    # and the visual tokenizer's
    assert found.num_records == len(records.units()) + len(records.annotations) + 2 + 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("unit", ProblemKind.RECORD),
        ("annotation", ProblemKind.RECORD),
        ("version", ProblemKind.VERSION),
        ("files", ProblemKind.VERSION_TABLE),
        ("changes", ProblemKind.VERSION_TABLE),
    ],
)
def test_damage_is_named_with_what_to_do(records, kind, expected, damage):
    path = {
        "unit": records.units()[0],
        "annotation": records.annotations[-1],
        "version": Path(records.versions[0].manifest_uri),
        "files": Path(records.versions[1].files_uri),
        "changes": Path(records.versions[1].changes_uri),
    }[kind]
    data = path.read_bytes()
    place = len(data) // 2
    flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
    path.write_bytes({"cut": data[:-20], "empty": b"", "flipped": flipped}[damage])
    found = verify_root(records.root.uri).problems
    assert {storage.local_path(problem.uri) for problem in found} == {path}
    assert {problem.kind for problem in found} == {expected}
    to_do = found[0].repair
    if kind == "version":
        assert "its number stays taken" in to_do
    else:
        assert f"ursa data repair {records.root.uri}" in to_do


def test_every_one_of_200_flipped_bits_is_found(records):
    random = np.random.default_rng(3)
    paths = records.all()
    assert len(paths) > 12
    assert look(records.root).problems == ()
    for number in range(200):
        path = paths[number % len(paths)]
        place, bit = int(random.integers(path.stat().st_size)), int(random.integers(8))
        data_roots.flip_bit(path, place, bit)
        names = {storage.local_path(problem.uri) for problem in look(records.root).problems}
        assert names == {path}, (path, place, bit)
        data_roots.flip_bit(path, place, bit)
    assert look(records.root).problems == ()


def test_every_truncated_record_is_found(records):
    random = np.random.default_rng(4)
    for path in records.all():
        data = path.read_bytes()
        for size in (0, 1, len(data) - 1, int(random.integers(len(data)))):
            path.write_bytes(data[:size])
            names = {storage.local_path(problem.uri) for problem in look(records.root).problems}
            assert names == {path}, (path, size)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(number=7), "says that its number is 7"),
        (lambda r: r.update(source_uri="/elsewhere"), "is of the source /elsewhere"),
        (
            lambda r: r.update(parent_uri="/x/y/000009.json"),
            "its parent /x/y/000009.json is missing",
        ),
        (lambda r: r["changes"].update(added=2, removed=2), "counts"),
        (lambda r: r["config"].update(seed=9), "does not have the fingerprint"),
        (lambda r: r["selection"].update(num_train=9), "differs from"),
        (lambda r: r.update(num_files=9), "4 rows, expected 9"),
    ],
)
def test_older_versions_must_fit_to_the_rest(records, change, message):
    """Records of older code hold no hash; they repeat what stands elsewhere."""
    without_hash(Path(records.versions[0].manifest_uri), change)
    problems = look(records.root).problems
    assert message in " ".join(problem.detail for problem in problems)


def test_older_annotations_must_be_where_they_are(records):
    one, two, three, *_ = records.annotations
    without_hash(one, lambda r: r.update(scorer_fingerprint="f" * 64))
    without_hash(two, lambda r: r.update(media_sha256="0" * 64))
    text = three.read_text("utf-8").replace("5.25", "1e999")
    three.write_text(text, "utf-8")
    without_hash(three)
    found = look(records.root)
    details = sorted(problem.detail for problem in found.problems)
    assert [problem.kind for problem in found.problems] == [ProblemKind.RECORD] * 3
    for path, message in (
        (one, "scorer ffff"),
        (two, "clip file 0000"),
        (three, "no finite number"),
    ):
        assert any(path.name in detail and message in detail for detail in details), message
    tokenizers, said = found.not_checked
    assert tokenizers == NOT_READ
    assert said == "every bit of 3 records that were written without a hash"


def test_records_of_another_schema_version_are_no_damage(records):
    path = records.units()[0]
    path.write_text('{"schema_version": 2, "kind": "IngestedVideo", "record": {}}', "utf-8")
    found = look(records.root)
    assert found.problems == ()
    assert found.not_checked == (
        NOT_READ,
        "1 records of other schema versions, which nothing reads any more",
    )


@pytest.mark.parametrize("with_media", [False, True])
def test_clips_that_only_unit_records_name_are_looked_at(records, with_media):
    """A run that begins anew would take them."""
    root = records.root
    for path in Path(root.uri).glob("clips/sets/*/*"):
        path.unlink()
    clip, other = root.media()[:2]
    clip.unlink()
    data_roots.flip_bit(other, 200, 1)
    tally = Tally(root.uri)
    verify_records(tally, {}, with_media=with_media)
    found = {problem.uri: problem for problem in tally.problems if "clips/media" in problem.uri}
    assert set(found) == {str(clip), *([str(other)] if with_media else [])}
    assert "it is missing" in found[str(clip)].detail
    units = [path for path in records.units() if clip.name in path.read_text("utf-8")]
    assert all(path.as_uri() in found[str(clip)].repair for path in units)


def test_reports_and_other_manifests_are_looked_at(records):
    root = records.root
    report = Path(root.selection.clips.manifest_uri).with_name(REPORT_NAME)
    record = AnnotationReport(parent=root.selection.clips, scorers=(), num_results={}, failed=())
    storage.commit_record(str(report), record)
    others = [Path(root.uri) / name / "x" / "manifest.json" for name in ("prepared", "drift")]
    for path in others:
        storage.commit_record(str(path), record)
    assert look(root).problems == ()
    for path in (report, *others):
        data_roots.flip_bit(path, path.stat().st_size // 2, 0)
    found = look(root).problems
    assert {storage.local_path(problem.uri) for problem in found} == {report, *others}
    assert all("delete" in problem.repair for problem in found)


def test_a_damaged_table_of_a_listing_is_named(records):
    root = records.root
    uri = storage.join(root.uri, "sources", "f" * 32, "manifest.json")
    video = SourceVideo(uri="s3://b/a.mp4", num_bytes=3, etag="e")
    listing = SourceListing(
        manifest_uri=uri, source_uri="s3://b", sources=(video,), notes_digest="n", fingerprint="f"
    )
    commit_listing(listing)
    assert look(root).problems == ()
    (table,) = Path(uri).parent.glob("sources-*.parquet")
    data_roots.flip_bit(table, table.stat().st_size // 2, 0)
    (problem,) = look(root).problems
    assert storage.local_path(problem.uri) == table
    assert "run the pipeline again on s3://b" in problem.repair
    commit_listing(listing)  # as a run does
    assert look(root).problems == ()


def test_tables_that_no_version_names(records):
    path = Path(records.versions[0].files_uri).with_name(f"files-{'0' * 16}.parquet")
    path.write_bytes(b"x")
    (problem,) = look(records.root).problems
    assert problem.uri == path.as_uri()
    assert problem.repair.startswith(f"delete {path.as_uri()}")


def test_a_copied_root_is_said_once_a_version(records, tmp_path):
    storage.upload_directory(Path(records.root.uri), str(tmp_path / "copy"))
    found = verify_root(str(tmp_path / "copy")).problems
    assert {"was copied or moved" in problem.detail for problem in found} == {True}


@pytest.mark.parametrize("command", ["versions", "uses", "changes"])
def test_lists_go_on_without_a_damaged_version(records, capsys, caplog, command):
    one = Path(records.versions[0].manifest_uri)
    data_roots.flip_bit(one, one.stat().st_size // 2, 0)
    file = str(records.root.source / "pan.mp4")
    arguments = [command, *([file] if command == "uses" else []), records.root.uri]
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stopped:
        main(["data", *arguments])
    assert not stopped.value.code
    assert one.as_uri() in caplog.text
    assert "`ursa data repair`" in caplog.text
    expected = {
        "versions": "captions",
        "uses": f"version 2 of {records.root.source}",
        "changes": f"settings are not compared: {one} cannot be read",
    }
    assert expected[command] in capsys.readouterr().out


def test_a_person_sees_the_warning(records):
    one = Path(records.versions[0].manifest_uri)
    one.write_bytes(b"")
    ursa = "from ursa.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", ursa, "data", "versions", records.root.uri],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert f"passed over: {one.as_uri()}: not a manifest" in done.stderr
    assert "`ursa data repair` mends it or says what to do" in done.stderr


def test_a_damaged_decision_is_named_and_keeps_its_place(records):
    decision = record_decision(
        records.root.uri,
        "ursa",
        "refused",
        registry_made_ms=0,
        version="1",
        champion=None,
        champion_before=None,
        previous_uri=None,
        reason="worse",
        decided_by="a test",
    )
    assert look(records.root).problems == ()
    path = storage.local_path(decision.record_uri)
    path.write_text(path.read_text("utf-8").replace("worse", "better"), "utf-8")
    (problem,) = look(records.root).problems
    assert storage.local_path(problem.uri) == path
    assert "its number stays taken" in problem.repair
