import pytest
from hypothesis import given
from hypothesis import strategies as st

from ursa.data.units import _spans
from ursa.data.versions import Change, FileChange, compare_files

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
