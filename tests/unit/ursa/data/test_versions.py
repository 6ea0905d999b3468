import functools
import hashlib
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import factories
from ursa import storage
from ursa.artifacts import (
    Clip,
    ClipScores,
    FailureReason,
    IngestedVideo,
    SourceVideo,
    VideoInfo,
)
from ursa.cli import main
from ursa.config import fingerprint
from ursa.data.clips import (
    FAILURE_SCHEMA,
    SELECTION_SCHEMA,
    failure_row,
    put_table,
    read_clip_table,
    selection_rows,
)
from ursa.data.units import _spans
from ursa.data.versions import (
    Change,
    DatasetVersion,
    FileChange,
    commit_version,
    compare_files,
    find_fitted_uses,
    find_kept_tokenizer,
    find_uses,
    iter_ancestors,
    list_versions,
    newest_version,
    read_changes,
    read_version_files,
    recorded_source,
)
from ursa.errors import ShardFormatError

FILES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("UVWXYZ"))


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({}, {"a": "X"}, [FileChange(Change.ADDED, "a", "X")]),
        ({"a": "X"}, {"b": "X"}, [FileChange(Change.RENAMED, "b", "X", previous_uri="a")]),
        ({"a": "X"}, {"a": "Y"}, [FileChange(Change.EDITED, "a", "Y", previous_content="X")]),
        ({"a": "X"}, {}, [FileChange(Change.REMOVED, "a", "X")]),
        ({"a": "X"}, {"a": "X", "b": "X"}, [FileChange(Change.ADDED, "b", "X")]),
        # moved away, and another put in its place
        (
            {"a": "X"},
            {"a": "Y", "b": "X"},
            [
                FileChange(Change.ADDED, "a", "Y"),
                FileChange(Change.RENAMED, "b", "X", previous_uri="a"),
            ],
        ),
        # a chain, a swap, and one moved over another
        (
            {"a": "X", "b": "Y"},
            {"b": "X", "c": "Y"},
            [
                FileChange(Change.RENAMED, "b", "X", previous_uri="a"),
                FileChange(Change.RENAMED, "c", "Y", previous_uri="b"),
            ],
        ),
        (
            {"a": "X", "b": "Y"},
            {"a": "Y", "b": "X"},
            [
                FileChange(Change.RENAMED, "a", "Y", previous_uri="b"),
                FileChange(Change.RENAMED, "b", "X", previous_uri="a"),
            ],
        ),
        (
            {"a": "X", "b": "Y"},
            {"b": "X"},
            [
                FileChange(Change.REMOVED, "b", "Y"),
                FileChange(Change.RENAMED, "b", "X", previous_uri="a"),
            ],
        ),
        # two copies, of which one is renamed
        (
            {"a": "X", "b": "X"},
            {"b": "X", "c": "X"},
            [FileChange(Change.RENAMED, "c", "X", previous_uri="a")],
        ),
        # nobody could read it before, or now: whether it was edited is not known
        ({"a": "etag:1", "b": "X"}, {"a": "X", "b": "etag:2"}, []),
        (
            {"a": "etag:1"},
            {"a": "etag:2"},
            [FileChange(Change.EDITED, "a", "etag:2", None, "etag:1")],
        ),
    ],
)
def test_changes_are_named(before, after, changes):
    assert compare_files(before, after) == changes


@given(FILES, FILES)
def test_changes_lead_from_one_version_to_the_other(before, after):
    changes = compare_files(before, after)
    kept = {uri: content for uri, content in before.items() if after.get(uri) == content}
    new = [item for item in changes if item.change != Change.REMOVED]
    assert {**kept, **{item.source_uri: item.content for item in new}} == after
    assert len(kept) + len(new) == len(after), "a file is named twice"
    # and each old file is kept, moved, edited or removed, once
    origins = [item.previous_uri for item in changes if item.change == Change.RENAMED]
    edited = [item.source_uri for item in changes if item.change == Change.EDITED]
    removed = [item.source_uri for item in changes if item.change == Change.REMOVED]
    assert sorted([*kept, *origins, *edited, *removed]) == sorted(before)
    for item in changes:
        if item.change == Change.RENAMED:
            assert before[item.previous_uri] == item.content
        elif item.change == Change.EDITED:
            assert before[item.source_uri] == item.previous_content != item.content
    # nothing is called new that was there and is nowhere now
    added = {item.content for item in changes if item.change in {Change.ADDED, Change.EDITED}}
    assert not added & {item.content for item in changes if item.change == Change.REMOVED}


@given(
    st.lists(st.integers(0, 2**48 - 1), max_size=60, unique=True),
    st.integers(1, 6),
    st.integers(0, 2**48 - 1),
)
def test_a_clip_more_changes_its_unit_and_few_others(numbers, mean, new):
    ids = sorted(f"{number:012x}" for number in numbers)
    more = sorted({*ids, f"{new:012x}"})

    def units(clip_ids):
        return [tuple(clip_ids[start:end]) for start, end in _spans(clip_ids, mean)]

    old, grown = units(ids), units(more)
    assert sum(old, ()) == tuple(ids)
    assert sum(grown, ()) == tuple(more)
    assert all(0 < len(unit) <= 2 * mean for unit in grown)
    # up to the next id where a unit must begin, which is where both come together again
    changed = [unit for unit in grown if unit not in old]
    boundaries = [clip_id for clip_id in more if int(clip_id, 16) % mean == 0]
    inside = [
        clip_id
        for clip_id in boundaries
        if any(clip_id in unit and clip_id != unit[0] for unit in changed)
    ]
    assert inside == []
    first_clean = next((b for b in boundaries if b > f"{new:012x}"), None)
    assert all(first_clean is None or unit[0] < first_clean for unit in changed)


INFO = VideoInfo(width_px=64, height_px=48, fps=12.0, num_frames=18, duration_s=1.5, codec="h264")
CONFIG = factories.tiny_config({"text_tokenizer": {"refit_growth": None}})


def clip(name, **changes):
    """A clip of the file of that name."""
    values = {
        "clip_id": fingerprint("clip", name)[:32],
        "source_uri": f"file:///videos/{name}.mp4",
        "source_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "start_s": 0.0,
        "end_s": 1.5,
        "media_uri": "file:///gone.mp4",
        "media_sha256": "0" * 64,
        "info": INFO,
        "scores": ClipScores(**dict.fromkeys(ClipScores.model_fields)),
        "caption": f"of {name}",
    }
    return Clip(**(values | changes))


class Ledger:
    """Commits versions without decoding anything."""

    def __init__(self, folder, data):
        self.uri, self._data, self._count = str(folder), data, 0
        place = {"manifest_uri": f"{folder}/text.json"}
        self.text_tokenizer = data.text_tokenizer.model_copy(update=place)
        storage.commit_record(self.text_tokenizer.manifest_uri, self.text_tokenizer)

    def select(self, clips, source_uri="/videos"):
        self._count += 1
        place = storage.join(self.uri, "sets", str(self._count))
        selection = factories.commit_selection(place, clips)
        put_table(place, "failures", FAILURE_SCHEMA, [])
        print_ = fingerprint([item.model_dump(mode="json") for item in clips])
        changes = {"source_uri": source_uri, "fingerprint": print_}
        return selection.model_copy(
            update={"clips": selection.clips.model_copy(update=changes), "fingerprint": print_}
        )

    def commit(self, clips, source_uri="/videos", visual=None, config=CONFIG, rejected=()):
        tokenizers = (visual or self._data.visual_tokenizer, self.text_tokenizer)
        selection = self.select(clips, source_uri)
        if rejected:
            table = read_clip_table(selection.clips)
            reasons = ["too_dark" if item in rejected else None for item in clips]
            rows = selection_rows(table, reasons, [None if why else "train" for why in reasons])
            place = storage.join(self.uri, "sets", str(self._count))
            uri = put_table(place, "selection", SELECTION_SCHEMA, rows)
            changes = {"selection_uri": uri, "fingerprint": fingerprint(uri)}
            selection = selection.model_copy(update=changes)
        return commit_version(
            self.uri, config, selection, tokenizers, self._data.datasets, code={"ursa": "test"}
        )

    def visual(self, name):
        """A visual tokenizer of a content of its own."""
        changes = {"sha256": {"model.safetensors": name}, "fingerprint": name}
        return self._data.visual_tokenizer.model_copy(update=changes)

    def export(self, model, name, tokens_uri, started_from_uri=None, parent_uri=None):
        """Commit a model like another one; return its directory."""
        place = storage.join(self.uri, "models", name)
        changes = {
            "manifest_uri": f"{place}/manifest.json",
            "directory_uri": f"{place}/model",
            "tokens_uri": tokens_uri,
            "started_from_uri": started_from_uri,
            "checkpoint": model.checkpoint.model_copy(update={"parent_uri": parent_uri}),
        }
        copy = model.model_copy(update=changes)
        return storage.commit_record(copy.manifest_uri, copy).directory_uri

    def grow(self, count):
        """Versions of one file, two files, and so on."""
        return [self.commit([clip(name) for name in "abcdef"[:n]]) for n in range(1, count + 1)]


@pytest.fixture
def ledger(tmp_path, tiny_data):
    return Ledger(tmp_path / "data", tiny_data)


def damage(uri, how):
    path = storage.local_path(uri)
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:100], "flipped": data.replace(b"3", b"2", 1), "": b""}[how])


@pytest.mark.parametrize("how", ["cut", "flipped", ""])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_version_is_named_and_passed_over(ledger, caplog, place, how):
    versions = ledger.grow(3)
    damage(versions[place].manifest_uri, how)
    left = [version for version in versions if version is not versions[place]]
    with caplog.at_level(logging.WARNING):
        assert list_versions(ledger.uri) == left
        assert newest_version(ledger.uri, "/videos") == left[-1]
        assert list(iter_ancestors(left[-1])) == left[::-1]
        holds_a = [version for version, _ in find_uses(ledger.uri, "file:///videos/a.mp4")]
    assert holds_a == left
    assert versions[place].manifest_uri in caplog.text
    assert "`ursa data repair`" in caplog.text


@pytest.mark.parametrize("how", ["cut", "flipped", ""])
def test_the_number_of_a_damaged_version_stays_taken(ledger, how):
    one, two = ledger.grow(2)
    damage(two.manifest_uri, how)
    before = storage.read_bytes(two.manifest_uri)
    three = ledger.commit([clip("a"), clip("c")])
    assert (three.number, three.parent_uri) == (3, one.manifest_uri)
    assert [item.source_uri for item in read_changes(three)] == ["file:///videos/c.mp4"]
    assert storage.read_bytes(two.manifest_uri) == before
    # the same data again: noticed, though the damaged record stands between
    assert ledger.commit([clip("a"), clip("c")]) == three
    four = ledger.commit([clip("a"), clip("b")])
    assert (four.number, four.parent_uri) == (4, three.manifest_uri)
    assert [item.number for item in iter_ancestors(four)] == [4, 3, 1]


def test_only_damaged_versions(ledger):
    (one,) = ledger.grow(1)
    damage(one.manifest_uri, "cut")
    two = ledger.commit([clip("a")])
    assert (two.number, two.parent_uri, two.changes[Change.ADDED]) == (2, None, 1)


def test_versions_of_another_schema_keep_their_numbers(ledger):
    (one,) = ledger.grow(1)
    storage.write_bytes(
        one.manifest_uri, b'{"schema_version": 2, "kind": "DatasetVersion", "record": {}}'
    )
    assert ledger.commit([clip("a")]).number == 2


def test_a_record_that_is_cut_off_on_its_way_is_no_damage(ledger, monkeypatch):
    versions = ledger.grow(2)
    read, cut = storage.read_bytes, set()

    def once(uri):
        data = read(uri)
        if not uri.endswith(".json") or uri in cut:
            return data
        cut.add(uri)
        return data[: len(data) // 2]

    monkeypatch.setattr(storage, "read_bytes", once)
    three = ledger.commit([clip("c")])
    assert (three.number, three.parent_uri) == (3, versions[1].manifest_uri)
    assert cut


def test_a_kept_tokenizer_is_found_behind_a_damaged_version(ledger):
    versions = ledger.grow(3)
    damage(versions[2].manifest_uri, "cut")
    selection = ledger.select([clip("d")])
    kept = find_kept_tokenizer(ledger.uri, selection, CONFIG, "text_tokenizer")
    assert kept == ledger.text_tokenizer


@pytest.mark.parametrize("how", ["cut", "missing"])
def test_files_of_a_version_are_counted_again_where_their_table_is_damaged(ledger, caplog, how):
    one, two = ledger.grow(2)
    files = read_version_files(two)
    damage(two.files_uri, how)
    with caplog.at_level(logging.WARNING):
        assert read_version_files(two) == files
        assert [version.number for version, _ in find_uses(ledger.uri, files[0]["content"])] == [
            1,
            2,
        ]
        three = ledger.commit([clip("a")])
    assert [item.change for item in read_changes(three)] == [Change.REMOVED]
    assert two.files_uri in caplog.text
    damage(two.clips.clips_uri, "missing")
    with caplog.at_level(logging.WARNING):
        found = find_uses(ledger.uri, files[0]["content"])
    assert [version.number for version, _ in found] == [1, 3]
    assert f"the files of {two.manifest_uri} are not known" in caplog.text
    damage(one.changes_uri, how)
    with pytest.raises(ShardFormatError, match="`ursa data repair`"):
        read_changes(one)


def test_changed_captions_are_named(ledger):
    ledger.commit([clip("a"), clip("b"), clip("c"), clip("d"), clip("e")])
    two = ledger.commit(
        [
            clip("a", caption="another"),
            clip("b", license="CC BY"),
            clip("c", caption=None),
            clip("d"),
            clip("e", source_uri="file:///videos/moved.mp4", caption="of moved"),
        ]
    )
    assert two.changes == {
        **dict.fromkeys(Change, 0),
        Change.RECAPTIONED: 3,
        Change.RENAMED: 1,
    }
    assert two.num_unchanged == 1
    assert read_changes(two) == [
        FileChange(Change.RECAPTIONED, item.source_uri, item.source_sha256)
        for item in (clip("a"), clip("b"), clip("c"))
    ] + [
        FileChange(
            Change.RENAMED,
            "file:///videos/moved.mp4",
            clip("e").source_sha256,
            previous_uri="file:///videos/e.mp4",
        )
    ]


def test_captions_that_cannot_be_compared_are_said(ledger, caplog):
    one = ledger.commit([clip("a")])
    damage(one.clips.clips_uri, "cut")
    with caplog.at_level(logging.WARNING):
        two = ledger.commit([clip("a", caption="another")])
    assert two.changes == dict.fromkeys(Change, 0)
    assert "captions are not compared" in caplog.text
    assert one.clips.clips_uri in caplog.text


@pytest.mark.parametrize(
    "spelling",
    ["/videos/", "/x/../videos", "//videos/.", "file:///videos", "file://localhost/videos/"],
)
def test_a_source_has_one_chain_however_it_is_written(ledger, spelling):
    assert recorded_source(ledger.uri, spelling) == "/videos"
    (one,) = ledger.grow(1)
    assert recorded_source(ledger.uri, spelling) == "/videos"
    two = ledger.commit([clip("b")], recorded_source(ledger.uri, spelling))
    assert two.parent_uri == one.manifest_uri


@pytest.mark.parametrize("old", ["file:///videos", "/videos/", "s3://bucket//videos/"])
def test_versions_under_an_older_spelling_go_on(ledger, old):
    """Older code wrote a source as it was given; nothing is made anew because of that."""
    one = ledger.commit([clip("a")], old)
    spellings = [old, storage.absolute_uri(old), f"{storage.absolute_uri(old)}/"]
    for spelling in spellings:
        assert recorded_source(ledger.uri, spelling) == old
        assert ledger.commit([clip("a")], recorded_source(ledger.uri, spelling)) == one
    # with versions under the one spelling as well, those count
    ledger.commit([clip("a")], storage.absolute_uri(old))
    assert {recorded_source(ledger.uri, spelling) for spelling in spellings} == {
        storage.absolute_uri(old)
    }


def test_records_without_hash_and_new_kinds_are_read(ledger):
    """What older code wrote: no hash, no count of captions."""
    (one,) = ledger.grow(1)
    path = Path(one.manifest_uri)
    values = json.loads(path.read_text("utf-8"))
    del values["sha256"]
    del values["record"]["changes"]["recaptioned"]
    path.write_text(json.dumps(values), "utf-8")
    (found,) = list_versions(ledger.uri)
    assert isinstance(found, DatasetVersion)
    assert Change.RECAPTIONED not in found.changes
    assert len(read_changes(found)) == 1
    assert ledger.commit([clip("a"), clip("b")]).parent_uri == one.manifest_uri


def test_a_name_that_nobody_found_is_no_file(ledger):
    """A manifest may name what is not there: it is neither new nor as before."""

    def commit(*names, missing=()):
        selection = ledger.select([clip(name) for name in names])
        rows = [
            failure_row(
                IngestedVideo(
                    source=SourceVideo(uri=f"file:///videos/{name}.mp4", num_bytes=0, etag="none"),
                    source_sha256=None,
                    info=None,
                    clips=(),
                    failure=FailureReason.MISSING,
                    detail="",
                )
            )
            for name in missing
        ]
        place = selection.clips.clips_uri.rpartition("/")[0]
        for item in storage.list_files(place, with_etag=False):
            if "failures" in item.uri:
                storage.remove_file(item.uri)
        put_table(place, "failures", FAILURE_SCHEMA, rows)
        clips = selection.clips.model_copy(update={"num_failed": len(rows)})
        selection = selection.model_copy(update={"clips": clips})
        tokenizers = (ledger._data.visual_tokenizer, ledger.text_tokenizer)
        return commit_version(
            ledger.uri, CONFIG, selection, tokenizers, ledger._data.datasets, code={}
        )

    one = commit("a", "b", "c", missing=("d",))
    assert (one.changes[Change.ADDED], one.num_unchanged) == (3, 0)
    two = commit("a", "b", missing=("d",))
    assert (two.changes[Change.REMOVED], two.num_unchanged) == (1, 2)


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("file:///x/x.tar#v3.mp4", "/x/x.tar#v3.mp4"),
        ("file:///x/x.tar#a%20b/v3.mp4", "/x/x.tar#a b/v3.mp4"),
        ("file:///x/x.tar#a%20b/v3.mp4", "file:///x/x.tar#a%20b/v3.mp4"),
        ("file:///x/x.tar#a%23b.mp4", "FILE:///x/../x//x.tar#a#b.mp4"),
        ("file:///x/a%23b.mp4", "/x/a#b.mp4"),
        ("file:///x/x.tar#v3.mp4", "/x/./x.tar"),
        ("s3://b/x.tar#v3.mp4", "s3://b//x.tar#v3.mp4"),
        ("file:///v/v0.mp4", "file:///other/../v/v0.mp4"),
        ("file:///v/v0.mp4", "file:///v//v0.mp4"),
        ("file:///v/v0.mp4", "file://localhost/v/v0.mp4"),
        ("file:///v/v0.mp4", "FILE:///v/v0.mp4"),
        ("file:///v/v%200.mp4", "file:///v/v 0.mp4"),
        ("s3://b/k.mp4", "s3://b//k.mp4"),
        ("s3://b/k.mp4", "S3://b/k.mp4"),
        ("https://a.org/k.mp4", "HTTPS://A.org:443/k.mp4"),
        ("https://A.org/k.mp4", "https://A.org/k.mp4"),
    ],
)
def test_a_file_is_found_however_it_is_spelled(ledger, capsys, held, asked):
    ledger.commit([clip("a", source_uri=held), clip("b")])
    with pytest.raises(SystemExit) as stopped:
        main(["data", "uses", asked, ledger.uri])
    assert not stopped.value.code
    assert f"  {held}: ok, 1 of 1 clips kept" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["/videos", "/videos/c.mp4", "a.mp4#b.mp4", "0" * 64])
def test_a_file_that_no_version_holds_is_not_found(ledger, capsys, asked):
    ledger.commit([clip("a"), clip("b")])
    with pytest.raises(SystemExit) as stopped:
        main(["data", "uses", asked, ledger.uri])
    assert stopped.value.code == 1
    assert "no version holds" in capsys.readouterr().out


def test_versions_with_a_tokenizer_that_was_fitted_with_a_file_are_listed(ledger, capsys):
    fitted = ledger.visual("fitted")
    one = ledger.commit([clip("a")], visual=ledger.visual("before"))
    two = ledger.commit([clip("a"), clip("b")], visual=fitted)
    kept = ledger.commit([clip("a"), clip("c")], visual=fitted)
    refitted = ledger.commit([clip("a"), clip("d")], visual=ledger.visual("refitted"))
    # of another source, from the directory of a model of the first
    kinds = ("visual_tokenizer", "text_tokenizer")
    taken = factories.tiny_config({kind: {"directory_uri": f"/models/{kind}"} for kind in kinds})
    borrowed = ledger.commit([clip("x")], "/other", fitted, taken)
    assert find_fitted_uses(ledger.uri, [two]) == [(borrowed, ("visual",)), (kept, ("visual",))]
    # the one text tokenizer of all of them was made for the first
    by_text = [(version, ("text",)) for version in (borrowed, two, kept, refitted)]
    assert find_fitted_uses(ledger.uri, [one]) == by_text
    for holder in (kept, refitted, borrowed):
        assert find_fitted_uses(ledger.uri, [holder]) == []

    with pytest.raises(SystemExit):
        main(["data", "uses", "/videos/b.mp4", ledger.uri])
    assert capsys.readouterr().out.splitlines() == [
        f"version 2 of {two.source_uri}",
        "  file:///videos/b.mp4: ok, 1 of 1 clips kept",
        f"version 1 of {borrowed.source_uri}",
        "  no clip of it kept, but fitted with it: tokenizers (visual)",
        f"version 3 of {two.source_uri}",
        "  no clip of it kept, but fitted with it: tokenizers (visual)",
    ]


def test_models_that_began_with_one_that_saw_a_file_are_listed(
    ledger, exported_model, tiny_data, capsys
):
    one, two = ledger.grow(2)
    seen = exported_model.tokens_uri  # every version of this ledger has these tokens
    assert one.tokens_uri == two.tokens_uri == seen

    export = functools.partial(ledger.export, exported_model)
    saw = export("f", seen)
    child = export("e", "/newer.json", started_from_uri=f"{saw}/transformer", parent_uri="/step-1")
    grandchild = export("d", "/newest.json", started_from_uri=Path(child).as_uri())
    by_older_code = export("c", "/newer.json", parent_uri=saw)
    # a sibling whose name begins alike, and one that was drawn
    export("b", "/newer.json", started_from_uri=f"{saw}2")
    export("a", "/newer.json", parent_uri="/checkpoints/step-1")
    with pytest.raises(SystemExit):
        main(["data", "uses", "/videos/b.mp4", ledger.uri, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["models"] == [saw]
    assert row["descendants"] == [by_older_code, child, grandchild]
    with pytest.raises(SystemExit):
        main(["data", "uses", "/videos/b.mp4", ledger.uri])
    out = capsys.readouterr().out
    assert f"  model {saw}\n" in out
    assert f"  model {grandchild}, whose weights began with those of a model above\n" in out


@pytest.fixture
def uses(ledger, capsys):
    """Asks what `ursa data uses` says of a file of the ledger, as JSON or as text."""

    def ask(name, *options):
        with pytest.raises(SystemExit) as stopped:
            main(["data", "uses", f"/videos/{name}.mp4", ledger.uri, *options])
        assert not stopped.value.code
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in options else out

    return ask


def test_models_that_never_saw_a_file_are_not_listed(ledger, exported_model, uses):
    dark, fitted = clip("dark"), ledger.visual("fitted")
    version = ledger.commit([clip("a"), dark], visual=fitted, rejected=[dark])
    ledger.commit([clip("a"), clip("c")], visual=fitted)
    saw = ledger.export(exported_model, "f", version.tokens_uri)
    out = uses("dark")
    assert "  file:///videos/dark.mp4: ok, 0 of 1 clips kept\n" in out
    assert "model" not in out
    assert "tokenizers" not in out, "they are fitted with clips that were kept"
    (row,) = uses("dark", "--json")
    assert (row["clips"], row["kept_clips"], row["models"], row["descendants"]) == (1, 0, [], [])
    one, _ = uses("a", "--json")
    assert (one["kept_clips"], one["models"]) == (1, [saw])

    # a version that holds the file has a tokenizer of one that kept it
    kept = ledger.commit([clip("a"), clip("b")], visual=ledger.visual("other"))
    later = ledger.commit(
        [clip("a"), clip("b")], visual=ledger.visual("other"), rejected=[clip("b")]
    )
    assert later.number == kept.number + 1
    rows = uses("b", "--json")
    assert [(row["version"], row["kept_clips"], row["tokenizers"]) for row in rows] == [
        (kept.number, 1, []),
        (later.number, 0, []),
        (later.number, 0, ["visual"]),
    ]
    assert [row["models"] for row in rows] == [[saw], [], [saw]]


def test_models_that_may_have_seen_a_file_are_listed(ledger, exported_model, uses, caplog):
    version = ledger.commit([clip("a")], rejected=[clip("a")])
    saw = ledger.export(exported_model, "f", version.tokens_uri)
    damage(version.selection.selection_uri, "cut")
    assert "  file:///videos/a.mp4: ok, unknown of 1 clips kept\n" in uses("a")
    assert "which clips were kept is not known: " in caplog.text
    (row,) = uses("a", "--json")
    assert (row["kept_clips"], row["models"]) == (None, [saw])


def test_marked_versions_are_named(ledger, exported_model, uses, monkeypatch):
    dark = clip("dark")
    version = ledger.commit([clip("a"), dark], rejected=[dark])
    saw = ledger.export(exported_model, "f", version.tokens_uri)
    asked = []

    def flag_versions(name, *, directories, **_):
        asked.append((name, directories))
        names = {"name": "ursa", "version": "3", "aliases": ["champion"]}
        return [{**names, "directory": directory} for directory in directories]

    monkeypatch.setattr("ursa.cli.backstage.call_tasks", flag_versions)
    monkeypatch.setattr("ursa.cli.models.check_answers", lambda _: None)
    assert uses("a", "--flag", "why").endswith("\nflagged ursa version 3 (champion)\n")
    (row,) = uses("a", "--flag", "why", "--json")
    (marked,) = row["flagged"]
    assert (marked["name"], marked["version"], marked["aliases"]) == ("ursa", "3", ["champion"])
    assert uses("dark", "--flag", "why").endswith("\nno version of these models is registered\n")
    (row,) = uses("dark", "--flag", "why", "--json")
    assert row["flagged"] == []
    models = [("flag-versions", [saw])] * 2
    assert asked == [*models, *[("flag-versions", [])] * 2]
    (row,) = uses("a", "--json")
    assert "flagged" not in row
