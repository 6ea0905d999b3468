import time

import numpy as np
import pytest

from ursa.video.duplicates import (
    MAX_DISTANCE,
    drop_repeats,
    find_clusters,
    find_likeness,
    join,
)


def texts(frames):
    """Hashes as they are stored: shape (clips, frames), uint64."""
    return [row.astype(">u8").tobytes().hex() for row in frames]


def random_frames(number, num_frames=9, *, seed=0):
    shape = (number, num_frames)
    return np.random.default_rng(seed).integers(1, 1 << 63, shape, dtype=np.uint64)


def disturbed(frames, bits, *, seed=0):
    """Other hashes, each of which differs in exactly so many bits."""
    rng = np.random.default_rng(seed)
    out = frames.copy()
    for value in np.nditer(out, op_flags=["readwrite"]):
        for bit in rng.choice(64, bits, replace=False):
            value[...] ^= np.uint64(1) << np.uint64(bit)
    return out


def pairs_by_comparison(frames, distance):
    """All near pairs, found by comparing all with all."""
    found = set()
    for one in range(len(frames)):
        for other in range(one):
            bits = np.bitwise_count(frames[one][:, None] ^ frames[other][None, :])
            near = (bits <= distance) & (frames[one] != 0)[:, None] & (frames[other] != 0)
            needed = frames.shape[1] // 2 + 1
            if min(near.any(axis=1).sum(), near.any(axis=0).sum()) >= needed:
                found.add((other, one))
    return found


def pairs_of(likeness):
    """Near pairs of clips, of one group or of two."""
    near = {tuple(pair) for pair in likeness.near_groups.tolist()}
    groups = likeness.group_of.tolist()
    return {
        (one, other)
        for other in range(len(groups))
        for one in range(other)
        if groups[one] >= 0 and groups[other] >= 0
        if groups[one] == groups[other] or tuple(sorted((groups[one], groups[other]))) in near
    }


@pytest.mark.parametrize("num_frames", [1, 2, 9])
@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
def test_the_pairs_are_those_of_comparing_all_with_all(distance, num_frames):
    base = random_frames(40, num_frames, seed=distance)
    # near each other in some frames, by a few bits more or less, and in another order
    mixed = [disturbed(base, bits, seed=bits)[:, ::-1] for bits in (0, 2, 4, 6, 8, 9)]
    frames = np.concatenate([base, *mixed])
    frames[np.random.default_rng(1).random(frames.shape) < 0.2] = 0
    found = pairs_of(find_likeness(texts(frames), distance))
    assert found == pairs_by_comparison(frames, distance)
    assert found


@pytest.mark.parametrize("distance", [2, 5, 8])
def test_the_order_of_the_clips_does_not_matter(distance):
    frames = random_frames(50)
    frames = np.concatenate([frames, disturbed(frames[:20], distance)])
    order = np.random.default_rng(3).permutation(len(frames))
    plain = pairs_of(find_likeness(texts(frames), distance))
    mixed = pairs_of(find_likeness(texts(frames[order]), distance))
    assert {tuple(sorted((order[a], order[b]))) for a, b in mixed} == plain
    assert len(plain) == 20


def test_what_is_not_measured_or_shows_nothing_is_like_no_other():
    nothing = "0" * 144
    likeness = find_likeness([None, nothing, nothing, None], 8)
    assert likeness.group_of.tolist() == [-1] * 4
    assert find_clusters(likeness).tolist() == [0, 1, 2, 3]
    assert find_likeness([], 8).near_groups.shape == (0, 2)
    assert find_likeness([None], 8).near_groups.shape == (0, 2)


def test_a_chain_is_one_cluster_but_only_near_ones_are_dropped():
    first = random_frames(1)
    second = disturbed(first, 6, seed=1)
    third = disturbed(second, 6, seed=2)
    likeness = find_likeness(texts(np.concatenate([first, second, third])), 6)
    assert pairs_of(likeness) == {(0, 1), (1, 2)}
    assert len(set(find_clusters(likeness).tolist())) == 1
    assert drop_repeats(likeness, [0, 1, 2]) == {1}
    assert drop_repeats(likeness, [1, 2, 0]) == {0, 2}
    assert drop_repeats(likeness, [2, 0]) == set()


def test_an_edge_named_often_is_an_edge():
    """256 times: a sum in eight bits would be none."""
    edges = np.array([[0, 1]] * 256 + [[2, 3]])
    assert join(edges, 5).tolist() == [0, 0, 1, 1, 2]


def test_ten_thousand_equal_clips_are_one_group():
    likeness = find_likeness(texts(np.repeat(random_frames(1), 10_000, axis=0)), 8)
    assert set(likeness.group_of.tolist()) == {0}
    assert len(drop_repeats(likeness, range(10_000))) == 9_999


@pytest.mark.slow
def test_a_hundred_thousand_clips_take_seconds():
    """Comparing all with all would be 405 thousand million comparisons of hashes."""
    frames = random_frames(100_000)
    copies = disturbed(frames[:200], 8)
    start = time.process_time()
    likeness = find_likeness(texts(np.concatenate([frames, copies])), 8)
    assert time.process_time() - start < 60
    assert len(likeness.near_groups) == 200
