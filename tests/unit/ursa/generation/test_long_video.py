import numpy as np
import pytest

from ursa.errors import ConfigError
from ursa.generation import slide_window


def numbered(calls):
    """A generator of frames that count on from the last given one."""

    def generate(given, num_frames):
        calls.append((None if given is None else len(given), num_frames))
        first = 0 if given is None else int(given[0, 0, 0, 0])
        frames = np.arange(first, first + num_frames, dtype=np.uint8)
        if given is not None:
            assert np.array_equal(given[:, 0, 0, 0], frames[: len(given)])
        return np.broadcast_to(frames[:, None, None, None], (num_frames, 2, 2, 3)).copy()

    return generate


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 20, 33, 50])
@pytest.mark.parametrize("given", [None, 5, 7])
def test_windows_join_without_a_seam(num_frames, given):
    calls = []
    generate = numbered(calls)
    known = None if given is None else generate(None, given)
    calls.clear()
    frames = slide_window(
        generate,
        num_frames=num_frames,
        window_frames=9,
        overlap_frames=5,
        temporal_stride=4,
        given=known,
    )
    assert frames[:, 0, 0, 0].tolist() == list(range(num_frames))
    for kept, size in calls:
        assert size <= 9 or kept is None
        assert (size - 1) % 4 == 0 or kept is None
        assert kept in (None, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_frames": 8}, r"window_frames must be 1 \+ 4k, got 8"),
        ({"overlap_frames": 3}, r"overlap_frames must be 1 \+ 4k, got 3"),
        ({"overlap_frames": 9}, "overlap_frames 9 must be less than window_frames 9"),
    ],
)
def test_counts_that_do_not_fit_are_refused(changes, message):
    options = {"window_frames": 9, "overlap_frames": 5, "temporal_stride": 4} | changes
    with pytest.raises(ConfigError, match=message):
        slide_window(numbered([]), num_frames=33, **options)
