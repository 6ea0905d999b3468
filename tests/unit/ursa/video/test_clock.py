import pytest

from ursa.video.clock import FrameClock

NOMINAL_S = 0.04


def run(timestamps):
    clock = FrameClock(NOMINAL_S)
    return [clock.advance(pts, dts) for pts, dts in timestamps]


def test_presentation_times_count_from_the_first_frame():
    ticks = run([(100.0, None), (100.5, None), (100.6, None)])
    assert [tick.time_s for tick in ticks] == pytest.approx([0.0, 0.5, 0.6])
    assert not any(tick.is_break for tick in ticks)


def test_frames_without_timestamps_follow_at_the_nominal_distance():
    ticks = run([(None, None), (None, None), (None, None)])
    assert [tick.time_s for tick in ticks] == pytest.approx([0.0, 0.04, 0.08])


def test_decoding_times_stand_in_for_missing_presentation_times():
    ticks = run([(None, 3.0), (None, 3.1), (None, 3.3)])
    assert [tick.time_s for tick in ticks] == pytest.approx([0.0, 0.1, 0.3])


def test_presentation_times_in_coding_order_are_replaced_by_decoding_times():
    # frames come in display order, but with the timestamps of their packets
    coded = [0, 3, 2, 4, 1, 6, 5, 8, 7, 9]
    ticks = run([(pts / 25, (index + 2) / 25) for index, pts in enumerate(coded)])
    times = [tick.time_s for tick in ticks]
    assert not any(tick.is_break for tick in ticks)
    assert times == sorted(times)
    assert times[4:] == pytest.approx([index / 25 for index in range(4, 10)])


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, -5.0])
def test_a_torn_clock_goes_on_and_is_a_break(jump_s):
    ticks = run([(0.0, 0.0), (0.1, 0.1), (0.1 + jump_s, 0.1 + jump_s), (0.2 + jump_s, None)])
    assert [tick.is_break for tick in ticks] == [False, False, True, False]
    assert [tick.time_s for tick in ticks] == pytest.approx([0.0, 0.1, 0.14, 0.24])
