import json

import numpy as np
import pytest
from PIL import Image

from tests import data_roots
from ursa import storage
from ursa.data.clips import read_selection
from ursa.errors import ConfigError, VideoDecodeError
from ursa.inspection.examples import choose_examples, read_strip, write_examples


@pytest.mark.parametrize(
    ("options", "number", "count"),
    [
        ({}, 9, 5),
        ({"kept": True}, 9, 4),
        ({"kept": True}, 2, 2),
        ({"kept": False}, 9, 1),
        ({"reason": "too_dark"}, 9, 1),
        ({"reason": "blurred"}, 9, 0),
        ({"kept": True, "reason": "too_dark"}, 9, 0),
    ],
)
def test_examples_are_of_the_kind_that_is_asked_for(root, options, number, count):
    found = choose_examples(root.selection, number, **options)
    assert len(found) == count == len({item.clip.clip_id for item in found})
    assert all(item in read_selection(root.selection) for item in found)
    assert all(item.kept == options.get("kept", item.kept) for item in found)


def test_few_examples_are_spread_over_all(root):
    kept = [item for item in read_selection(root.selection) if item.kept]
    assert choose_examples(root.selection, 2, kept=True) == [kept[0], kept[2]]


def test_mistakes_are_named(root):
    with pytest.raises(ConfigError, match="no reason 'blured'; did you mean 'blurred'"):
        choose_examples(root.selection, 1, reason="blured")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        choose_examples(root.selection, 0)


def test_clips_are_copied_with_scores_and_reasons(root, tmp_path):
    found = choose_examples(root.selection, 9)
    paths = write_examples(found, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "examples.json").read_text("utf-8"))
    assert {path.parent.name for path in paths} == {"kept", "too_dark"}
    for item, path, row in zip(found, paths, rows, strict=True):
        assert path.read_bytes() == storage.read_bytes(item.clip.media_uri)
        assert row["file"] == path.relative_to(tmp_path / "out").as_posix()
        assert row["clip"]["scores"]["luminance"] == item.clip.scores.luminance
        assert row["reason"] == item.reason


def test_strips_show_first_to_last_frame(root, tmp_path):
    (item,) = choose_examples(root.selection, 1, reason="too_dark")
    (path,) = write_examples([item], tmp_path, as_strips=True)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (90, 4 * 120, 3)
    assert picture.mean() < 8
    bright = read_strip(choose_examples(root.selection, 1, kept=True)[0].clip)
    assert bright.mean() > 60
    assert not np.array_equal(bright[:, :120], bright[:, -120:])


def test_names_from_a_table_stay_in_the_folder(root, tmp_path):
    (item,) = choose_examples(root.selection, 1, reason="too_dark")
    clip = item.clip.model_copy(update={"clip_id": "../../../evil"})
    folder = tmp_path / "a" / "b"
    (path,) = write_examples([item.model_copy(update={"clip": clip})], folder)
    assert path.parent == folder / "too_dark"


def test_a_damaged_clip_is_never_decoded(root, tmp_path):
    (item,) = choose_examples(root.selection, 1, reason="too_dark")
    data_roots.flip_bit(storage.local_path(item.clip.media_uri), 300, 5)
    with pytest.raises(VideoDecodeError, match=r"is damaged: .*; run `ursa data repair`"):
        write_examples([item], tmp_path, as_strips=True)
    storage.remove_file(item.clip.media_uri)
    with pytest.raises(VideoDecodeError, match="is missing"):
        write_examples([item], tmp_path)
