"""Every mode is a mask of given frames and the time at which each frame begins to move."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.diffusion.timesteps import inference_times
from ursa.generation.conditions import frame_clock, given_codes

few = settings(max_examples=60, deadline=None)
starts = st.lists(
    st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0, width=32), min_size=1, max_size=6
)


@few
@given(starts, st.integers(1, 30), st.floats(0.25, 8.0))
def test_the_steps_of_a_frame_tile_its_time(start, num_steps, shift):
    start = torch.tensor(start)
    times = [*inference_times(num_steps, shift).tolist(), 1.0]
    reached = start.clone()
    for t, t_next in itertools.pairwise(times):
        begin, end = frame_clock(start, t, t_next)
        waits = start >= t_next
        assert torch.equal(begin[waits], end[waits])
        # who moves goes on where it stopped, to the end of the step
        torch.testing.assert_close(begin[~waits], reached[~waits], rtol=0, atol=1e-6)
        assert (end[~waits] == torch.tensor(t_next, dtype=torch.float32)).all()
        assert (end >= begin).all()
        reached = torch.where(waits, reached, end)
    assert (reached == 1).all()  # all have arrived; a frame that began at 1 never left


@few
@given(st.data(), st.integers(1, 5), st.integers(1, 3))
def test_the_mask_is_what_was_given_and_nothing_else(data, num_frames, num_videos):
    shape = (num_frames, 2, 3)
    rows = data.draw(st.sampled_from([1, num_videos]))
    length = data.draw(st.integers(1, num_frames))
    codes = torch.arange(rows * length * 6).view(rows, length, 2, 3)
    indices = data.draw(st.none() | st.lists(st.integers(0, length - 1), unique=True))
    conditions = given_codes(codes, indices, num_videos=num_videos, shape=shape)
    wanted = set(range(length)) if indices is None else set(indices)
    assert set(conditions.given.nonzero().flatten().tolist()) == wanted
    for frame in wanted:
        for video in range(num_videos):
            source = video if rows == num_videos else 0
            assert torch.equal(conditions.codes[video, frame], codes[source, frame])
