import av
import numpy as np
import pytest
import torch
from PIL import Image

from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE
from ursa.training.checkpoint import load_checkpoint
from ursa.training.samples import step_folder
from ursa.training.stage import samples_uri, train_stage

SHORT = {"max_steps": 4, "checkpoint_every": 4, "validate_every": 4}


def files_of(request, step):
    folder = storage.local_path(step_folder(samples_uri(request), step))
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("stage", ["image_pretrain", "async_finetune"])
def test_samples_are_drawn_at_intervals_and_change_nothing(make_request, stage):
    request = make_request(stage, sample_every=2, **SHORT)
    found = train_stage(request)
    assert files_of(request, 1) == {} == files_of(request, 3)
    start, first, second = (files_of(request, step) for step in (0, 2, 4))
    sampling = request.config.evaluation.sampling
    is_image = stage == "image_pretrain"
    clips = set() if is_image else {f"{number}.mp4" for number in range(sampling.num_prompts)}
    assert set(start) == set(first) == set(second) == {SAMPLES_PICTURE, *clips}
    assert start[SAMPLES_PICTURE].read_bytes() != second[SAMPLES_PICTURE].read_bytes()
    size = request.config.tokenization
    columns = 1 if is_image else min(5, size.num_frames)
    with Image.open(first[SAMPLES_PICTURE]) as picture:
        assert picture.width == 2 * columns * size.width_px
        assert np.asarray(picture).std() > 0
    for name in clips:
        with av.open(str(first[name])) as clip:
            assert sum(1 for _ in clip.decode(video=0)) == size.num_frames
    without = train_stage(make_request(stage, output="without", **SHORT))
    one, other = (load_checkpoint(item.uri)[1] for item in (found, without))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_weights_give_the_same_samples(make_request):
    pictures = []
    for output in ("one", "other"):
        request = make_request("video_pretrain", output=output, sample_every=4, **SHORT)
        train_stage(request)
        pictures.append(files_of(request, 4)[SAMPLES_PICTURE].read_bytes())
    assert pictures[0] == pictures[1]
