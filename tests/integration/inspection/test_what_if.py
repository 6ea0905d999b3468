import av
import cv2
import decord
import pytest

from tests import data_roots
from ursa.data.clips import read_clip_table, read_clips, read_selection, unchecked_clips
from ursa.errors import ConfigError
from ursa.ingestion import select_clips
from ursa.inspection.what_if import what_if
from ursa.video import fork_server, reader


def with_thresholds(**values):
    return data_roots.root_config(selection=values)


def test_the_same_thresholds_change_nothing(root):
    result = what_if(root.uri, root.config)
    assert result.now == result.then
    assert result.gained == result.lost == ()


def test_what_would_be_kept_is_what_a_selection_keeps(root, tmp_path):
    limit = sorted(clip.scores.sharpness for clip in read_clips(root.selection.clips))[2]
    config = with_thresholds(min_luminance=None, min_sharpness=limit + 0.1)
    result = what_if(root.uri, config)
    real = select_clips(root.selection.clips, config.selection, output_uri=str(tmp_path))
    before = {item.clip.clip_id for item in read_selection(root.selection) if item.kept}
    after = {item.clip.clip_id for item in read_selection(real) if item.kept}
    assert before != after
    assert {item.clip_id for item in result.gained} == after - before
    assert {item.clip_id for item in result.lost} == before - after
    assert {item.reason_then for item in result.lost} == {"blurred"}
    funnel = {row.step: row.count for row in result.then.funnel}
    assert funnel["kept for training"] == real.num_train
    assert funnel["kept for validation"] == real.num_validation
    assert funnel["rejected: blurred"] == real.rejections["blurred"]
    assert result.then.num_kept == real.num_kept


def test_keeping_nothing_is_an_answer(root):
    result = what_if(root.uri, with_thresholds(min_luminance=255.0))
    assert result.then.num_kept == result.then.kept_s == 0
    assert len(result.lost) == 4


def test_no_video_is_opened_and_nothing_is_written(root, monkeypatch):
    """Not one reader of any library is called, and the clips need not be there."""
    opened = []
    here = ((av, "open"), (decord, "VideoReader"), (cv2, "VideoCapture"))
    elsewhere = ((fork_server, "ForkServer"), (reader, "_Child"))
    for module, name in (*here, *elsewhere):
        monkeypatch.setattr(module, name, lambda *_, **__: opened.append(1))
    for path in root.media():
        path.unlink()
    before = root.files()
    assert what_if(root.uri, with_thresholds(min_luminance=None)).then.num_kept > 0
    assert opened == []
    assert root.files() == before


def test_rows_that_are_not_validated_again_are_the_same_clips(root):
    clips = read_clips(root.selection.clips)
    assert unchecked_clips(read_clip_table(root.selection.clips)) == clips
    assert len(clips) == 5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_seed_decides_which_sources_would_be_held_out(root, tmp_path, seed):
    config = data_roots.root_config(selection={"validation_fraction": 0.5, "split_seed": seed})
    real = select_clips(root.selection.clips, config.selection, output_uri=str(tmp_path))
    funnel = {row.step: row.count for row in what_if(root.uri, config).then.funnel}
    assert funnel["kept for validation"] == real.num_validation


def test_a_recipe_is_tried(root):
    result = what_if(root.uri, with_thresholds(recipe="ursa-basic"))
    funnel = {row.step: row.count for row in result.then.funnel}
    assert funnel["rejected: too_low:clip-file/duration_s"] == 4
    with pytest.raises(ConfigError, match=r"koala_vtss/suitability for koala\.0"):
        what_if(root.uri, with_thresholds(recipe="koala"))
