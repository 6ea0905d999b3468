"""Clips that show the same: near pairs of perceptual hashes, without comparing all with all.

A clip has a 64-bit hash for each of a few frames (`ursa.video.scores`). A frame of one clip is
seen again in another if a hash there differs in few bits. Two clips are near-duplicates if most
frames of each are seen again in the other: so copies that were trimmed or sped up are found, and
shots that have one picture in common are not.

Pairs are found by multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): of two hashes that
differ in at most d bits, one of b bands differs in at most d / b. Bands are joined by sorting the
values near them, so the time grows with the clips and the pairs found, not with all pairs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_DIGITS = 16
"""Hexadecimal digits of the hash of a frame."""
HASH_BITS = 4 * HASH_DIGITS
MAX_DISTANCE = 8
"""Bits; beyond it, one of the bands may differ in three bits: too many values to join."""
_NUM_BANDS = 3
_PART_BITS = 4
"""The values of a band are joined in parts, by their first bits: a sixteenth of the memory."""
_CHUNK_PAIRS = 1 << 22
_CHUNK_VALUES = 1 << 17


class Likeness(NamedTuple):
    """Which clips show the same: clips of equal hashes are one group, groups may be near."""

    group_of: np.ndarray
    """Group of every clip, shape (number of clips,), int64; -1 is like no other."""
    near_groups: np.ndarray
    """Pairs of groups, the smaller first, shape (number of pairs, 2), int64."""


def find_likeness(hashes: Sequence[str | None], max_distance: int) -> Likeness:
    """Find the clips that show the same.

    Args:
        hashes: Perceptual hash of every clip: `HASH_DIGITS` hexadecimal digits a frame, equally
            many frames for all; None is not measured. A frame of zeros alone shows nothing and is
            like no other.
        max_distance: Bits in which the hashes of two frames may differ, 0 to `MAX_DISTANCE`.

    Returns:
        Groups and near pairs of them; they do not depend on the order of the clips.
    """
    group_of = np.full(len(hashes), -1, np.int64)
    rows = [place for place, text in enumerate(hashes) if text is not None]
    if not rows:
        return Likeness(group_of, np.empty((0, 2), np.int64))
    digits = "".join(hashes[row] or "" for row in rows)
    frames = np.frombuffer(bytes.fromhex(digits), ">u8").reshape(len(rows), -1).astype(np.uint64)
    is_seen = np.count_nonzero(frames, axis=1) >= _num_needed(frames.shape[1])
    frames, inverse = np.unique(frames[is_seen], axis=0, return_inverse=True)
    group_of[np.array(rows)[is_seen]] = inverse.reshape(-1)
    return Likeness(group_of, _near_rows(frames, max_distance))


def find_clusters(likeness: Likeness) -> np.ndarray:
    """Return the cluster of every clip: clips that are near, directly or by way of others.

    Args:
        likeness: Result of `find_likeness`.

    Returns:
        Numbers of clusters, shape (number of clips,), int64; a clip like no other has its own.
    """
    num_groups = int(likeness.group_of.max(initial=-1)) + 1
    alone = likeness.group_of < 0
    num_alone = int(np.count_nonzero(alone))
    nodes = likeness.group_of.copy()
    nodes[alone] = num_groups + np.arange(num_alone)
    clusters: np.ndarray = join(likeness.near_groups, num_groups + num_alone)[nodes]
    return clusters


def join(pairs: np.ndarray, num_nodes: int) -> np.ndarray:
    """Return the component of every node of a graph.

    Args:
        pairs: Edges, shape (number of edges, 2), int64.
        num_nodes: Number of nodes.

    Returns:
        Numbers of components, shape (num_nodes,), int64.
    """
    # weights of edges that are named twice are added: a small integer would overflow to no edge
    weights = np.ones(len(pairs), np.float64)
    graph = coo_array((weights, (pairs[:, 0], pairs[:, 1])), shape=(num_nodes, num_nodes))
    components: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    return components


def drop_repeats(likeness: Likeness, order: Sequence[int]) -> set[int]:
    """Return the clips to drop so that no two of those that stay are near.

    Args:
        likeness: Result of `find_likeness`.
        order: Places of clips, the one to prefer first; the others are left out of account.

    Returns:
        Places of the clips that are near one which comes before and stays.
    """
    near: dict[int, list[int]] = {}
    for one, other in likeness.near_groups.tolist():
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    taken: set[int] = set()
    dropped: set[int] = set()
    for place in order:
        group = int(likeness.group_of[place])
        if group < 0:
            continue
        if group in taken or any(other in taken for other in near.get(group, ())):
            dropped.add(place)
        else:
            taken.add(group)
    return dropped


def _num_needed(num_frames: int) -> int:
    """Return how many frames must be seen again: most of them."""
    return num_frames // 2 + 1


def _near_rows(frames: np.ndarray, max_distance: int) -> np.ndarray:
    """Return the pairs of rows that are near-duplicates, in order."""
    num_rows, num_frames = frames.shape
    # one frame more than may be unlike: at least one of them is seen again in a near-duplicate
    num_anchors = num_frames - _num_needed(num_frames) + 1
    first = (num_frames - num_anchors) // 2
    anchors = frames[:, first : first + num_anchors].ravel()
    anchor_rows = np.repeat(np.arange(num_rows), num_anchors)
    frame_rows = np.repeat(np.arange(num_rows), num_frames)
    found = [np.empty(0, np.int64)]
    for one, other in _near_values(anchors, frames.ravel(), max_distance):
        rows = np.stack([anchor_rows[one], frame_rows[other]])
        low, high = rows.min(axis=0), rows.max(axis=0)
        found.append(np.unique((low * num_rows + high)[low < high]))
    keys = np.unique(np.concatenate(found))
    pairs = np.stack([keys // max(num_rows, 1), keys % max(num_rows, 1)], axis=1)
    is_near = [
        _most_seen_again(frames[part[:, 0]], frames[part[:, 1]], max_distance)
        for part in np.array_split(pairs, -(-len(pairs) // (_CHUNK_PAIRS // num_frames**2)) or 1)
    ]
    near: np.ndarray = pairs[np.concatenate(is_near)]
    return near


def _most_seen_again(one: np.ndarray, other: np.ndarray, max_distance: int) -> np.ndarray:
    """Whether most frames of each are seen again in the other, shape (number of pairs,), bool."""
    near = np.bitwise_count(one[:, :, None] ^ other[:, None, :]) <= max_distance
    near &= (one != 0)[:, :, None] & (other != 0)[:, None, :]
    num_seen = np.minimum(near.any(axis=2).sum(axis=1), near.any(axis=1).sum(axis=1))
    enough: np.ndarray = num_seen >= _num_needed(one.shape[1])
    return enough


def _near_values(
    ones: np.ndarray, others: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places of values that differ in at most so many bits; zeros are like nothing."""
    placed = [np.flatnonzero(values != 0) for values in (ones, others)]
    for start, stop, radius in split_bands(max_distance):
        # two bits are bridged from both sides, one bit from one
        lefts = around(ones, placed[0], start, stop, with_flips=radius == 2)
        rights = around(others, placed[1], start, stop, with_flips=radius >= 1)
        for left, right in zip(lefts, rights, strict=True):
            right.sort()
            for one, other in _joined(left, right):
                is_near = np.bitwise_count(ones[one] ^ others[other]) <= max_distance
                yield one[is_near], other[is_near]


def split_bands(max_distance: int) -> Iterator[tuple[int, int, int]]:
    """Yield the bands of a hash: first bit, bit after the last, bits that may differ in one.

    Args:
        max_distance: Bits in which two hashes may differ; in one of the bands it is no more.
    """
    edges = np.linspace(0, HASH_BITS, _NUM_BANDS + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        yield start, stop, max_distance // _NUM_BANDS


def around(
    values: np.ndarray, places: np.ndarray, start: int, stop: int, *, with_flips: bool
) -> Iterator[np.ndarray]:
    """Yield a band of values and what is one bit away, each above its place, part by part.

    Args:
        values: Hashes, shape (number of values,), uint64.
        places: Which of them, int64, below 2 ** 32.
        start: First bit of the band.
        stop: Bit after its last one.
        with_flips: Whether to yield what is one bit away.

    Yields:
        uint64 with the band in the upper half and the place in the lower, in order if there are
        no flips; those of a part have the first bits of the band in common.
    """
    width = stop - start
    shift = width - _PART_BITS
    # all values at once would be the largest array that there is
    part_of = np.empty(len(places), np.uint8)
    for first in range(0, len(places), _CHUNK_VALUES):
        chunk = values[places[first : first + _CHUNK_VALUES]] >> np.uint64(start + shift)
        part_of[first : first + _CHUNK_VALUES] = chunk & np.uint64((1 << _PART_BITS) - 1)

    def ordered(part: int) -> np.ndarray:
        chosen = places[part_of == part]
        bands: np.ndarray = values[chosen]
        bands >>= np.uint64(start)
        bands &= np.uint64((1 << width) - 1)
        bands <<= np.uint64(32)
        np.bitwise_or(bands, chosen, out=bands, dtype=np.uint64, casting="unsafe")
        bands.sort()
        return bands

    if not with_flips:
        yield from map(ordered, range(1 << _PART_BITS))
        return
    parts = [ordered(part) for part in range(1 << _PART_BITS)]
    masks = [0, *((1 << bit) for bit in range(width))]
    for part in range(len(parts)):
        # a flipped first bit comes from another part
        yield np.concatenate(
            [parts[part ^ (mask >> shift)] ^ np.uint64(mask << 32) for mask in masks]
        )


def _joined(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places whose values are equal, some at a time; `right` is sorted, `left` is then."""
    low_bits, place_bits = np.uint64(32), np.uint64((1 << 32) - 1)
    left.sort()
    values = right >> low_bits
    starts = np.searchsorted(values, left >> low_bits, side="left")
    counts = np.searchsorted(values, left >> low_bits, side="right") - starts
    has_any = counts > 0
    left, starts, counts = left[has_any], starts[has_any], counts[has_any]
    ends = np.cumsum(counts)
    first = 0
    while first < len(left):
        before = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, before + _CHUNK_PAIRS, side="right")))
        part = counts[first:last]
        one = np.repeat(left[first:last], part) & place_bits
        within = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part)
        other = right[np.repeat(starts[first:last], part) + within] & place_bits
        yield one.astype(np.int64), other.astype(np.int64)
        first = last
