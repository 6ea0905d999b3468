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
    files = dict(before)
    changes = compare_files(before, after)
    for item in changes:
        if item.change == Change.REMOVED:
            assert files.pop(item.source_uri) == item.content
        elif item.change == Change.RENAMED:
            assert files.get(item.previous_uri) == item.content
    for item in changes:
        if item.change == Change.RENAMED and item.previous_uri not in after:
            del files[item.previous_uri]
        if item.change != Change.REMOVED:
            files[item.source_uri] = item.content
    assert files == after
    # nothing is called new that was there
    kept = {uri for uri in before if after.get(uri) == before[uri]}
    assert not kept & {item.source_uri for item in changes}


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
