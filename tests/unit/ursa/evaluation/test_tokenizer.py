import numpy as np
import pytest

from tests import factories, media
from ursa.artifacts import SelectedClip
from ursa.data.clips import clip_windows
from ursa.evaluation.samples import draw_samples
from ursa.evaluation.tokenizer import measure_code_usage, measure_tokenizer, perplexity
from ursa.evaluation.windows import iter_windows
from ursa.generation import UrsaPipeline
from ursa.video.decode import FrameSize, read_frames_at, video_info


def test_at_most_32_windows_of_a_split_from_one_reading(exported_model, tmp_path):
    frames = media.panning(60, step=1, height=48, width=64)
    path = media.save_video(tmp_path / "long.mp4", frames, 12.0)
    clip = factories.clip_of(path, caption="a", info=video_info(path))
    config = factories.tiny_config({"tokenization": {"window_stride_s": 0.09}})
    windows = dict(clip_windows(clip, config.tokenization))
    assert 32 < len(windows) < 64
    asked = []

    def read(path, indices, sizes):
        asked.append(indices)
        return read_frames_at(path, indices, sizes)

    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    selected = [SelectedClip(clip=clip, kept=True, reason=None, split="train")]
    found = measure_tokenizer(pipeline, selected, config, read)
    names = [item.metric for item in found.measures]
    assert names == ["tokenizer_psnr_train", "tokenizer_ssim_train"]
    assert len(asked) == 1
    assert len(found.cases[0].cases) == 32
    assert found.cases[0].unit == "span"
    chosen = list(iter_windows(selected, "train", config, read, limit=5))
    starts = {f"{clip.clip_id}@{start:.3f}": indices for start, indices in windows.items()}
    size = (config.tokenization.height_px, config.tokenization.width_px)
    for window in chosen:
        alone = read_frames_at(path, starts[window.name], [FrameSize(*size)])[0]
        np.testing.assert_array_equal(window.frames, alone)


def test_clips_that_cannot_be_read_are_left_out(exported_model, tmp_path):
    """A failure that tokenization allowed does not end the run here."""
    config = factories.tiny_config()
    frames = media.panning(60, step=1, height=48, width=64)
    good = media.save_video(tmp_path / "good.mp4", frames, 12.0)
    info = video_info(good)
    lost = media.save_video(tmp_path / "lost.mp4", frames, 12.0)
    clips = [
        factories.clip_of(path, caption="a", info=info, index=index)
        for index, path in enumerate((good, lost))
    ]
    lost.unlink()
    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    both, alone = (
        [SelectedClip(clip=clip, kept=True, reason=None, split="train") for clip in part]
        for part in (clips, clips[1:])
    )
    found = measure_tokenizer(pipeline, both, config)
    assert {case.partition("@")[0] for case in found.cases[0].cases} == {clips[0].clip_id}
    assert {sample.prompt for sample in draw_samples(pipeline, both, config)} == {"a"}
    assert measure_tokenizer(pipeline, alone, config).measures == ()
    assert draw_samples(pipeline, alone, config) == []


def test_usage_of_codes(token_datasets):
    assert perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(np.array([7])) == pytest.approx(1)
    usage, spread = measure_code_usage(token_datasets.video_train).measures
    assert 0 < usage.value <= 1
    assert 1 <= spread.value <= 60 * usage.value
    assert usage.low is None
