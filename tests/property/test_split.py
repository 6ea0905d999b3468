"""The split of sources: nothing leaks, and what was trained on stays for training."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from ursa.artifacts import Clip, ClipScores, VideoInfo
from ursa.config import SelectionConfig
from ursa.video.selection import choose_validation_sources, judge_clips

NO_SCORES = ClipScores(**dict.fromkeys(ClipScores.model_fields))
INFO = VideoInfo(width_px=64, height_px=64, fps=12, num_frames=12, duration_s=1, codec="h264")


def config(fraction, split_seed=0):
    off = dict.fromkeys(SelectionConfig.model_fields)
    off |= {"rules": [], "drop_duplicates": True, "max_duplicate_distance": 4}
    return SelectionConfig.model_validate(
        off | {"validation_fraction": fraction, "split_seed": split_seed}
    )


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def clip(source, scene, number):
    """A clip of a source that shows a scene; all of a scene are near-duplicates."""
    frames = [int(digest("scene", scene, k)[:16], 16) | 1 for k in range(5)]
    frames = [frame ^ (1 << (number % 60 + 2)) for frame in frames]
    return Clip(
        clip_id=digest("clip", source, scene, number)[:32],
        source_uri=f"file:///{source}.mp4",
        source_sha256=digest("source", source),
        start_s=0,
        end_s=1,
        media_uri="m",
        media_sha256="0" * 64,
        info=INFO,
        scores=NO_SCORES.model_copy(
            update={"perceptual_hash": "".join(f"{frame:016x}" for frame in frames)}
        ),
    )


clip_sets = st.lists(
    st.builds(clip, st.integers(0, 12), st.integers(0, 14), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)
fractions = st.floats(0.0, 1.0)
seeds = st.integers(0, 1000)


@given(clip_sets, fractions, seeds)
def test_no_source_and_no_scene_is_in_both_splits(clips, fraction, seed):
    judged = judge_clips(clips, config(fraction, seed))
    split_of = {}
    for item, split in zip(clips, judged.splits, strict=True):
        if split is not None:
            assert split_of.setdefault(item.source_sha256, split) == split
    scenes = {}
    for item in clips:  # dropped copies too: their source shows the scene
        scene = item.scores.perceptual_hash[:8]  # the copies differ in lower bits
        if item.source_sha256 in split_of:
            scenes.setdefault(scene, set()).add(split_of[item.source_sha256])
    assert all(len(splits) == 1 for splits in scenes.values())
    assert "train" in judged.splits


@given(
    st.lists(st.sets(st.integers(0, 60), max_size=4), max_size=12),
    st.lists(st.sets(st.integers(0, 90), max_size=4), max_size=12),
    st.floats(0.05, 0.6),
    seeds,
)
def test_what_was_trained_on_is_not_held_out_later(first, more, fraction, seed):
    """Any sources and links may come; groups only grow together."""
    before = groups_of(range(50), first)
    after = groups_of(range(80), [*first, *more])
    held_before = choose_validation_sources(before, fraction, seed=seed)
    held_after = choose_validation_sources(after, fraction, seed=seed)
    trained = {source for group in before for source in group} - held_before
    fell_back = all(rank_of(group, seed) >= fraction for group in after)
    assert fell_back or not trained & held_after
    # nothing moves without a link to a source for training
    alone = [group for group in before if group in after]
    if not fell_back and held_before != fallback(before, seed):
        assert all((group <= held_before) == (group <= held_after) for group in alone)


def groups_of(sources, links):
    groups = [{digest(source)} for source in sources]
    for link in links:
        names = {digest(source) for source in link if source in sources}
        touched = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names]
        groups += [set().union(*touched)] if touched else []
    return groups


def rank_of(group, seed):
    """The greatest number of its sources, as documented."""
    return max(
        int(hashlib.sha256(f"{seed}:{source}".encode()).hexdigest()[:16], 16) / 2**64
        for source in group
    )


def fallback(groups, seed):
    """The smallest group, of equal ones that with the least number."""
    return min(
        (frozenset(group) for group in groups),
        key=lambda group: (len(group), min(rank_of({source}, seed) for source in group)),
    )
