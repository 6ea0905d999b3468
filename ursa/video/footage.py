"""Which sources show the same footage, wherever each of them was cut.

A long take is cut into equal clips, so those of a copy that lacks its first seconds begin
elsewhere, and are no near-duplicates. But frame after frame is seen again, at one distance in time.
Clips have a hash for every eighth of a second (`ursa.video.scores`). Two clips share footage if, at
one distance, frames of the one are seen again in the other, at most one hash earlier or later, for
long enough (`MIN_SHARED_FRAMES`, `MIN_SHARED_FRACTION`) and through `MIN_PICTURES` pictures: of a
still any distance fits, which says nothing. Copies of stills are found by `ursa.video.duplicates`.

An excerpt over the border of two clips may show too little of either. So where a clip goes on after
another, the seconds before and after the border are compared as one more clip (`lay_out`).

Distances to try come from every `PROBE_STEP`-th frame of a clip, by multi-index hashing. Only what
joins sources that are not joined yet is looked at, so the time does not grow with the number of
copies of one piece.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ursa.artifacts import HASH_BYTES
from ursa.video.duplicates import around, join, split_bands
from ursa.video.scores import FOOTAGE_FPS

MIN_SHARED_FRAMES = 8
"""Hashed frames, one second: what is shorter is no shared footage."""
MIN_SHARED_FRACTION = 1 / 3
"""Of the frames of the shorter clip: a title at the head of two clips is no shared footage."""
MIN_PICTURES = 3
"""Pictures that footage goes through; one differs from the last by more than the distance."""
PROBE_STEP = 4
MAX_ALIKE = 256
"""Of the frames with a third of their bits in common with a probe, so many are looked at."""
_BORDER_BYTES = HASH_BYTES * MIN_SHARED_FRAMES
_CHUNK_PROBES = 1 << 17
_CHUNK_PAIRS = 1 << 22
_BATCH = 1 << 15


class ClipHashes(NamedTuple):
    """The hashed frames of a clip."""

    source: int
    """Number of the source, from 0."""
    start_s: float
    """Where the clip begins in its source, seconds."""
    end_s: float
    """Where it ends."""
    hashes: bytes
    """`FOOTAGE_FPS` a second, eight bytes each, big-endian."""


class ClipFrames(NamedTuple):
    """Hashes of the frames of clips, clip after clip, the clips of a source together."""

    values: np.ndarray
    """Hashes, shape (number of frames,), uint64; zero shows nothing."""
    first: np.ndarray
    """Place of the first frame of every clip, and the number of frames, int64."""
    source_of: np.ndarray
    """Source of every clip, shape (number of clips,), int64, never falling."""
    length: np.ndarray
    """Number of frames of which `MIN_SHARED_FRACTION` must be seen again, int64."""


def lay_out(clips: Iterable[ClipHashes]) -> ClipFrames:
    """Return the frames of clips, and of what is beside the borders of those that go on.

    Args:
        clips: Clips, by number of their source, then by start.
    """
    hashes = bytearray()
    first = [0]
    sources: list[int] = []
    lengths: list[int] = []
    last: ClipHashes | None = None
    for clip in clips:
        if last is not None and last.source == clip.source and last.hashes and clip.hashes:
            overlap = round((last.end_s - clip.start_s) * FOOTAGE_FPS)
            if overlap >= 0:
                after = clip.hashes[overlap * HASH_BYTES :][:_BORDER_BYTES]
                hashes += last.hashes[-_BORDER_BYTES:] + after
                first.append(len(hashes) // HASH_BYTES)
                sources.append(clip.source)
                # else a title between two clips would be a third of what is compared
                lengths.append(min(len(last.hashes), len(clip.hashes)) // HASH_BYTES)
        hashes += clip.hashes
        first.append(len(hashes) // HASH_BYTES)
        sources.append(clip.source)
        lengths.append(len(clip.hashes) // HASH_BYTES)
        last = clip
    # in place: a copy of all hashes would be half of what a selection holds
    values = np.frombuffer(hashes, np.uint64)
    if sys.byteorder == "little":
        values.byteswap(inplace=True)
    return ClipFrames(
        values,
        np.array(first, np.int64),
        np.array(sources, np.int64),
        np.array(lengths, np.int64),
    )


def join_by_footage(frames: ClipFrames, groups: np.ndarray, max_distance: int) -> np.ndarray:
    """Join groups of sources that show the same footage.

    Args:
        frames: Hashes of all clips; a clip may have none.
        groups: Group of every source, shape (number of sources,), int64.
        max_distance: Bits in which the hashes of two frames that show the same may differ, 0 to
            `duplicates.MAX_DISTANCE`.

    Returns:
        Group of every source, int64.
    """
    pictures = _pictures(frames, max_distance)
    counts = np.diff(frames.first)
    clip_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    moves = np.zeros(len(counts), bool)
    moves[clip_of[pictures >= MIN_PICTURES - 1]] = True
    groups = groups.copy()
    # what is written to `groups` is seen there
    for one, other in _near_frames(frames, clip_of, moves, groups, max_distance):
        ones, others = clip_of[one], clip_of[other]
        shift = (other - frames.first[others]) - (one - frames.first[ones])
        open_ = _is_open(frames, groups, ones, others)
        shape = (len(counts), len(counts), 2 * int(counts.max()) + 1)
        keys = np.ravel_multi_index(
            (ones[open_], others[open_], shift[open_] + shape[2] // 2), shape
        )
        tries = np.stack(np.unravel_index(np.unique(keys), shape), axis=1)
        tries[:, 2] -= shape[2] // 2
        # spread, or the first ones would all be of the same clips
        tries = tries[np.argsort(np.arange(len(tries)) % max(len(tries) // _BATCH, 1))]
        for batch in np.array_split(tries, len(tries) // _BATCH + 1):
            left = batch[_is_open(frames, groups, batch[:, 0], batch[:, 1])]
            shared = left[_is_shared(frames, pictures, left, max_distance)]
            if len(shared):
                edges = groups[frames.source_of[shared[:, :2]]]
                groups[:] = join(edges, int(groups.max()) + 1)[groups]
    return groups


def _is_open(
    frames: ClipFrames, groups: np.ndarray, ones: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Whether the sources of clips are not joined yet, bool."""
    is_open: np.ndarray = groups[frames.source_of[ones]] != groups[frames.source_of[others]]
    return is_open


def _pictures(frames: ClipFrames, max_distance: int) -> np.ndarray:
    """Return the number of the picture that each frame shows, from 0 in every clip, int32."""
    starts, counts = frames.first[:-1], np.diff(frames.first)
    numbers = np.zeros(len(frames.values), np.int32)
    clips = np.flatnonzero(counts)
    shown = frames.values[starts[clips]]
    number = np.zeros(len(clips), np.int32)
    for place in range(1, int(counts.max(initial=0))):
        is_left = counts[clips] > place
        clips, shown, number = clips[is_left], shown[is_left], number[is_left]
        values = frames.values[starts[clips] + place]
        is_new = np.bitwise_count(values ^ shown) > max_distance
        shown = np.where(is_new, values, shown)
        number += is_new
        numbers[starts[clips] + place] = number
    return numbers


def _near_frames(
    frames: ClipFrames,
    clip_of: np.ndarray,
    moves: np.ndarray,
    groups: np.ndarray,
    max_distance: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places of probes and of near frames in clips that move, of sources that come later."""
    values = frames.values
    usable = np.flatnonzero(moves[clip_of] & (values != 0)).astype(np.int32)
    within = usable - frames.first.astype(np.int32)[clip_of[usable]]
    probes = usable[within % PROBE_STEP == PROBE_STEP // 2]
    del within
    # places of a source are together: where the next one begins
    ends = np.searchsorted(frames.source_of, frames.source_of, side="right")
    following = frames.first[ends].astype(np.uint64)
    for start, stop, radius in split_bands(max_distance):
        # two bits are bridged from both sides, one bit from one
        lefts = around(values, probes, start, stop, with_flips=radius >= 1)
        rights = around(values, usable, start, stop, with_flips=radius == 2)
        for left, right in zip(lefts, rights, strict=True):
            if radius == 2:  # without flips it is in order
                right.sort()
            for piece in np.array_split(left, len(left) // _CHUNK_PROBES + 1):
                group_of = groups[frames.source_of]
                for one, other in _joined(piece, right, clip_of, following, group_of):
                    is_near = np.bitwise_count(values[one] ^ values[other]) <= max_distance
                    yield one[is_near], other[is_near]


def _joined(
    left: np.ndarray,
    right: np.ndarray,
    clip_of: np.ndarray,
    following: np.ndarray,
    group_of: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places whose bands are equal, at most `MAX_ALIKE` for each on the left.

    Those on the right are of sources after that on the left: from `following` of its clip on. They
    are left out where all of them are of its group.
    """
    low_bits, place_bits = np.uint64(32), np.uint64((1 << 32) - 1)
    ones = (left & place_bits).astype(np.int64)
    bands = left >> low_bits
    starts = np.searchsorted(right, (bands << low_bits) | following[clip_of[ones]])
    stops = np.searchsorted(right, (bands + np.uint64(1)) << low_bits)
    counts = np.minimum(stops - starts, MAX_ALIKE)
    groups = group_of[clip_of[(right & place_bits).astype(np.int64)]]
    runs = np.cumsum(np.diff(groups, prepend=groups[:1]) != 0)
    has_any = counts > 0
    firsts, lasts = starts[has_any], starts[has_any] + counts[has_any] - 1
    own = group_of[clip_of[ones[has_any]]]
    has_any[has_any] = (groups[firsts] != own) | (runs[firsts] != runs[lasts])
    ones, starts, counts = ones[has_any], starts[has_any], counts[has_any]
    ends = np.cumsum(counts)
    edges = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, _CHUNK_PAIRS))
    for first, last in itertools.pairwise([*edges.tolist(), len(ones)]):
        part = counts[first:last]
        one = np.repeat(ones[first:last], part)
        within = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part)
        other = right[np.repeat(starts[first:last], part) + within] & place_bits
        yield one, other.astype(np.int64)


def _is_shared(
    frames: ClipFrames, pictures: np.ndarray, tries: np.ndarray, max_distance: int
) -> np.ndarray:
    """Whether clips share footage at a distance: rows of clip, clip, frames; bool."""
    counts = np.diff(frames.first)
    ones, others, shifts = tries.T
    lows = np.maximum(0, -shifts - 1)
    highs = np.minimum(counts[ones], counts[others] - shifts + 1)
    lengths = highs - lows
    row = np.repeat(np.arange(len(tries)), lengths)
    within = lows[row] + np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = frames.first[ones[row]] + within
    value = frames.values[place]
    is_seen = np.zeros(len(row), bool)
    for step in (-1, 0, 1):
        then = within + shifts[row] + step
        is_there = (then >= 0) & (then < counts[others[row]])
        again = frames.values[np.where(is_there, frames.first[others[row]] + then, 0)]
        near = np.bitwise_count(value ^ again) <= max_distance
        is_seen |= is_there & near & (value != 0) & (again != 0)
    row, picture = row[is_seen], pictures[place[is_seen]]
    num_seen = np.bincount(row, minlength=len(tries))
    is_first = np.ones(len(row), bool)
    is_first[1:] = (row[1:] != row[:-1]) | (picture[1:] != picture[:-1])
    num_pictures = np.bincount(row[is_first], minlength=len(tries))
    shorter = np.minimum(frames.length[ones], frames.length[others])
    needed = np.maximum(MIN_SHARED_FRAMES, np.ceil(MIN_SHARED_FRACTION * shorter))
    shared: np.ndarray = (num_seen >= needed) & (num_pictures >= MIN_PICTURES)
    return shared
