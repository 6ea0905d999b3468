import itertools
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.detectors import compressed, cut_take, pan_take, wide_picture
from ursa.video.duplicates import MAX_DISTANCE
from ursa.video.footage import (
    MAX_ALIKE,
    MIN_PICTURES,
    MIN_SHARED_FRACTION,
    MIN_SHARED_FRAMES,
    PROBE_STEP,
    ClipFrames,
    ClipHashes,
    join_by_footage,
    lay_out,
)


def frames_of(clips, sources):
    """Clips of lists of hashes, those of a source together."""
    first = np.cumsum([0, *map(len, clips)])
    values = np.array([v for c in clips for v in c], np.uint64)
    return ClipFrames(values, first, np.array(sources), np.diff(first))


def groups_of(clips, sources, distance):
    """The partition of the sources, as sets of sources."""
    labels = join_by_footage(frames_of(clips, sources), np.arange(max(sources) + 1), distance)
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels}


def walk(rng, number, *, bits=6):
    """Hashes of footage that changes by so many bits from frame to frame."""
    values = [int(rng.integers(1, 1 << 63))]
    while len(values) < number:
        values.append(flipped(rng, values[-1], bits))
    return values


def flipped(rng, value, bits):
    for bit in rng.choice(64, bits, replace=False).tolist():
        value ^= 1 << bit
    return value


def near(one, other, distance):
    return one != 0 and other != 0 and (one ^ other).bit_count() <= distance


def pictures_of(clip, distance):
    """The number of the picture that each frame shows, from 1."""
    numbers, shown = [], clip[:1]
    for value in clip:
        if (value ^ shown[-1]).bit_count() > distance:
            shown.append(value)
        numbers.append(len(shown))
    return numbers


def is_seen(clip, place, distance):
    """Whether a hash is seen at a place of a clip, or one earlier or later."""
    around = clip[max(place - 1, 0) : max(place + 2, 0)]
    return lambda value: any(near(value, other, distance) for other in around)


def share(one, other, distance):
    numbers = pictures_of(one, distance)
    if min(max(numbers), max(pictures_of(other, distance))) < MIN_PICTURES:
        return False
    shifts = {
        there - here
        for here in range(PROBE_STEP // 2, len(one), PROBE_STEP)
        for there in range(len(other))
        if near(one[here], other[there], distance)
    }
    needed = max(MIN_SHARED_FRAMES, MIN_SHARED_FRACTION * min(len(one), len(other)))
    for shift in shifts:
        seen = [k for k, value in enumerate(one) if is_seen(other, k + shift, distance)(value)]
        if len(seen) >= needed and len({numbers[k] for k in seen}) >= MIN_PICTURES:
            return True
    return False


def by_comparison(clips, sources, distance):
    """The partition by comparing all with all, as the rule says it."""
    parts = [{source} for source in range(max(sources) + 1)]
    for one, other in itertools.combinations(range(len(clips)), 2):
        ends = {sources[one], sources[other]}
        if len(ends) == 2 and share(clips[one], clips[other], distance):
            joined = [part for part in parts if part & ends]
            parts = [part for part in parts if not part & ends] + [set().union(*joined)]
    return {frozenset(part) for part in parts}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, MAX_DISTANCE))
def test_the_groups_are_those_of_comparing_all_with_all(seed, distance):
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(0, 7))
    long = [walk(rng, 60, bits=bits) for _ in range(3)]
    clips, sources = [], []
    for source in range(8):
        for _ in range(int(rng.integers(1, 3))):
            first = int(rng.integers(0, 45))
            piece = long[int(rng.integers(3))][first : first + int(rng.integers(1, 40))]
            noise = int(rng.integers(0, distance + 2))
            # some frames are there twice, as in a copy of another rate
            piece = [value for value in piece for _ in range(1 + (rng.random() < 0.15))]
            clip = [flipped(rng, value, noise) for value in piece]
            clips.append([0 if rng.random() < 0.1 else value for value in clip])
            sources.append(source)
    found = groups_of(clips, sources, distance)
    assert found == by_comparison(clips, sources, distance)
    hypothesis.event(f"{len(found)} groups")


def shared(seconds, *, length=40, bits=6, changed=2):
    """Two clips whose ends and beginnings are the same for so many frames."""
    rng = np.random.default_rng(seconds)
    both = walk(rng, 2 * length, bits=bits)
    one, other = both[:length], both[length - seconds : 2 * length - seconds]
    return one, [flipped(rng, value, changed) for value in other]


@pytest.mark.parametrize(
    ("num_frames", "length", "is_joined"),
    [(14, 40, True), (13, 40, False), (8, 12, True), (7, 12, False)],
)
def test_a_third_of_the_shorter_clip_and_a_second(num_frames, length, is_joined):
    groups = groups_of(shared(num_frames, length=length), [0, 1], 4)
    assert len(groups) == (1 if is_joined else 2)


def test_a_picture_that_stays_says_nothing_of_time():
    """Two bits a frame and back: never more than four from the first."""
    rng = np.random.default_rng(0)
    value = int(rng.integers(1, 1 << 63))
    still = [[flipped(rng, value, 2) for _ in range(40)] for _ in range(2)]
    assert len(groups_of(still, [0, 1], 4)) == 2
    assert len(groups_of([[0] * 40] * 2, [0, 1], 4)) == 2
    assert join_by_footage(frames_of([[], []], [0, 1]), np.arange(2), 4).tolist() == [0, 1]


def test_a_still_that_two_moving_clips_have_in_common_joins_none():
    rng = np.random.default_rng(0)
    still = [int(rng.integers(1, 1 << 63))] * 20
    clips = [walk(rng, 20) + still, still + walk(rng, 20)]
    assert len(groups_of(clips, [0, 1], 4)) == 2


@pytest.mark.parametrize("is_first", [True, False])
def test_a_frame_may_be_seen_one_hash_earlier_or_later(is_first):
    """Every third of the frames is there twice: the distance in time is kept for three frames."""
    rng = np.random.default_rng(0)
    one = walk(rng, 30, bits=12)
    other = [value for k, value in enumerate(one[:12]) for _ in range(1 + (k % 4 == 1))]
    other += walk(rng, 20, bits=12)
    clips = [one, other] if is_first else [other, one]
    # of 24 frames of the shorter clip 10 are needed
    assert len(groups_of([clip[:26] for clip in clips], [0, 1], 4)) == 1


def test_what_is_joined_already_stays_so():
    one, other = shared(20)
    rng = np.random.default_rng(9)
    frames = frames_of([one, other, walk(rng, 40), walk(rng, 40)], [0, 1, 2, 3])
    labels = join_by_footage(frames, np.array([0, 1, 1, 2]), 4)
    assert labels[0] == labels[1] == labels[2] != labels[3]


def test_footage_that_more_sources_show_than_are_looked_at_joins_them_all():
    rng = np.random.default_rng(0)
    piece = walk(rng, 40)
    number = 2 * MAX_ALIKE
    noise = np.uint64(1) << rng.integers(0, 64, (number, 40), dtype=np.uint64)
    noisy = np.array(piece, np.uint64) ^ noise
    clips = [row[k % 10 : 30 + k % 10].tolist() for k, row in enumerate(noisy)]
    assert len(groups_of(clips, list(range(number)), 4)) == 1


@pytest.mark.parametrize(
    ("start_s", "first", "is_joined"),
    [(5, 40, True), (5.05, 40, True), (5.2, 41, False), (4.5, 36, True)],
)
def test_an_excerpt_over_a_border_is_found_where_a_clip_goes_on_after_another(
    start_s, first, is_joined
):
    """Of its twelve frames each clip shows six or seven, where a second is asked for."""
    rng = np.random.default_rng(0)
    long = walk(rng, 80)
    copy = [flipped(rng, value, 2) for value in long[34 if first > 36 else 31 :][:12]]
    clips = [
        clip_hashes(0, 0, long[:40]),
        clip_hashes(0, start_s, long[first:][:40]),
        clip_hashes(1, 0, copy),
    ]
    labels = join_by_footage(lay_out(clips), np.arange(2), 4)
    assert (labels[0] == labels[1]) == is_joined


def clip_hashes(source, start_s, values):
    hashes = np.array(values, ">u8").tobytes()
    return ClipHashes(source, start_s, start_s + len(values) / 8, hashes)


def test_what_is_laid_out():
    """A border adds a second on either side, without what both clips show; sources stay apart."""
    long = list(range(1, 31))
    clips = [
        clip_hashes(0, 0.0, long[:12]),
        clip_hashes(0, 1.25, long[10:30]),
        clip_hashes(0, 5.0, [31]),
        clip_hashes(2, 0.0, []),
        clip_hashes(2, 0.0, [32, 33]),
        clip_hashes(2, 0.25, [34]),
    ]
    frames = lay_out(clips)
    parts = [part.tolist() for part in np.split(frames.values, frames.first[1:-1])]
    assert parts == [
        *(long[:12], long[4:20], long[10:30], [31]),
        *([], [32, 33], [32, 33, 34], [34]),
    ]
    assert frames.source_of.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert frames.length.tolist() == [12, 12, 20, 1, 0, 2, 1, 1]
    assert frames.values.dtype == np.uint64
    assert lay_out([]).first.tolist() == [0]


@pytest.fixture(scope="module")
def ground():
    return wide_picture(1, 820)


@pytest.mark.parametrize("speed", [24, 48])
def test_a_long_take_without_its_first_seconds_is_found(ground, speed):
    """By 24 and 48 px a second of 320, at a lower rate and half the size, however it is cut."""
    take = pan_take(ground, speed, 0, 10)
    copy = compressed(take[:, ::2, ::2], 34)
    for longest_s in (5.0, 4.1):
        one = cut_take(take, longest_s)
        for first in (12, 31, 62, 84, 120):
            other = cut_take(copy[first:], longest_s)
            hashes = [np.frombuffer(item, ">u8").tolist() for item in [*one.dense, *other.dense]]
            sources = [0] * len(one.dense) + [1] * len(other.dense)
            assert len(groups_of(hashes, sources, 4)) == 1, (longest_s, first)


@pytest.mark.slow
def test_a_hundred_thousand_clips_take_seconds():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 1 << 63, (100_200, 40), dtype=np.uint64)
    values[100_000:, :20] = values[0:1000:5, 20:]
    sources = np.concatenate([np.repeat(np.arange(20_000), 5), np.arange(20_000, 20_200)])
    first = np.arange(0, values.size + 1, 40)
    frames = ClipFrames(values.ravel(), first, sources, np.diff(first))
    start = time.process_time()
    groups = join_by_footage(frames, np.arange(20_200), 4)
    assert time.process_time() - start < 60
    assert len(np.unique(groups)) == 20_000
