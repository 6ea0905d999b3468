from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ursa.artifacts import Clip, ClipScores, RejectReason, VideoInfo
from ursa.config import RECIPES, SelectionConfig, SelectionRule
from ursa.errors import ConfigError
from ursa.video.recipes import load_recipe, load_recipes
from ursa.video.score_table import BUILT_IN_SCORERS, SCORES, score_of
from ursa.video.selection import (
    THRESHOLD_KEYS,
    check_rules,
    choose_validation_sources,
    explain,
    judge_clips,
)


def selection_config(**changes):
    values = dict.fromkeys(SelectionConfig.model_fields) | {
        "min_motion_px_per_s": 2.0,
        "max_motion_px_per_s": 200.0,
        "min_sharpness": 10.0,
        "min_luminance": 16.0,
        "max_luminance": 240.0,
        "max_black_border_fraction": 0.3,
        "rules": [],
        "drop_duplicates": True,
        "validation_fraction": 0.2,
        "split_seed": 0,
    }
    return SelectionConfig.model_validate(values | changes)


def only(**changes):
    """No plain threshold but those given."""
    off = dict.fromkeys(SelectionConfig.model_fields)
    off |= {"rules": [], "drop_duplicates": False, "validation_fraction": 0.0, "split_seed": 0}
    return SelectionConfig.model_validate(off | changes)


def scores(**changes):
    values = {
        "motion_px_per_s": 20.0,
        "sharpness": 100.0,
        "luminance": 120.0,
        "black_border_fraction": 0.0,
        "perceptual_hash": "0" * 16,
        "camera_motion_px_per_s": 12.0,
        "object_motion_px_per_s": 8.0,
        "dark_fraction": 0.1,
        "bright_fraction": 0.1,
        "black_fraction": 0.1,
        "freeze_fraction": 0.1,
        "slideshow_fraction": 0.1,
        "distinct_fps": 11.0,
        "flicker": 0.5,
        "text_area_fraction": 0.01,
        "static_overlay_fraction": 0.01,
    }
    return ClipScores.model_validate(values | changes)


def clip(clip_id="a", *, source=None, info=None, extra=None, **changes):
    values = {"width_px": 64, "height_px": 64, "fps": 12, "num_frames": 12, "duration_s": 1}
    return Clip(
        clip_id=clip_id,
        source_uri="file:///a.mp4",
        source_sha256=source or "0" * 64,
        start_s=0,
        end_s=1,
        media_uri="m",
        media_sha256="0" * 64,
        info=VideoInfo(**values | {"codec": "h264"} | (info or {})),
        scores=scores(**changes),
        extra_scores=extra or {},
    )


def reason_of(config, **changes):
    """Verdict on one clip with other scores."""
    return judge_clips([clip(**changes)], config).reasons[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"motion_px_per_s": 1.9}, RejectReason.TOO_STATIC),
        ({"motion_px_per_s": 2.0}, None),
        ({"motion_px_per_s": 201.0}, RejectReason.TOO_FAST),
        ({"sharpness": 1.0}, RejectReason.BLURRED),
        ({"luminance": 3.0}, RejectReason.TOO_DARK),
        ({"luminance": 250.0}, RejectReason.TOO_BRIGHT),
        ({"black_border_fraction": 0.31}, RejectReason.BLACK_BORDERS),
        ({"motion_px_per_s": None}, RejectReason.NOT_MEASURED),
        # a black picture is called dark, not bordered
        ({"luminance": 0.0, "black_border_fraction": 1.0}, RejectReason.TOO_DARK),
    ],
)
def test_thresholds(changes, reason):
    assert reason_of(selection_config(), **changes) == reason


@pytest.mark.parametrize(
    ("threshold", "passes", "fails", "reason"),
    [
        ("max_camera_motion_px_per_s", 12.0, 11.9, RejectReason.CAMERA_TOO_FAST),
        ("min_object_motion_px_per_s", 8.0, 8.1, RejectReason.OBJECTS_TOO_STATIC),
        ("max_dark_fraction", 0.1, 0.09, RejectReason.UNDEREXPOSED),
        ("max_bright_fraction", 0.1, 0.09, RejectReason.OVEREXPOSED),
        ("max_black_fraction", 0.1, 0.09, RejectReason.BLACK_FRAMES),
        ("max_freeze_fraction", 0.1, 0.09, RejectReason.FROZEN),
        ("max_slideshow_fraction", 0.1, 0.09, RejectReason.SLIDESHOW),
        ("min_distinct_fps", 11.0, 11.1, RejectReason.REPEATED_FRAMES),
        ("max_flicker", 0.5, 0.4, RejectReason.FLICKER),
        ("max_text_area_fraction", 0.01, 0.009, RejectReason.TEXT),
        ("max_static_overlay_fraction", 0.01, 0.009, RejectReason.OVERLAY),
    ],
)
def test_every_score_has_a_threshold_of_its_own(threshold, passes, fails, reason):
    assert reason_of(selection_config(**{threshold: passes})) is None
    assert reason_of(selection_config(**{threshold: fails})) == reason


def test_every_reason_but_a_missing_score_names_its_threshold():
    assert set(RejectReason) - set(THRESHOLD_KEYS) == {RejectReason.NOT_MEASURED}
    assert set(THRESHOLD_KEYS.values()) == set(SelectionConfig.model_fields) - {
        "validation_fraction",
        "split_seed",
        "recipe",
    }
    for reason in RejectReason:
        assert explain(reason)
    assert explain("too_low:s/aesthetic") == "see `selection.rules` and `selection.recipe`"
    assert explain("not_measured:s/aesthetic").startswith("s/aesthetic")


def test_clips_may_be_too_short():
    assert reason_of(selection_config(min_clip_s=1.0)) is None
    assert reason_of(selection_config(min_clip_s=1.1)) == RejectReason.TOO_SHORT


def test_a_clip_that_does_not_move_has_no_overlay_and_no_repeated_frames():
    config = selection_config(min_distinct_fps=11.0, max_static_overlay_fraction=0.01)
    assert reason_of(config, distinct_fps=None, static_overlay_fraction=None) is None
    config = selection_config(max_flicker=1.0)
    assert reason_of(config, flicker=None) == RejectReason.NOT_MEASURED


def test_a_threshold_can_be_switched_off():
    config = selection_config(min_motion_px_per_s=None, max_motion_px_per_s=None)
    assert reason_of(config, motion_px_per_s=None) is None


def test_only_the_first_of_equal_clips_is_kept():
    clips = [clip("a"), clip("b"), clip("a")]
    assert judge_clips(clips, selection_config()).reasons == [
        None,
        None,
        RejectReason.DUPLICATE,
    ]
    config = selection_config(drop_duplicates=False)
    assert judge_clips(clips, config).reasons == [None] * 3


def test_no_clips_are_an_answer():
    judged = judge_clips([], only(recipe="cosmos", max_duplicate_distance=4))
    assert judged.reasons == judged.splits == []


# --- scores and their scorers


def test_every_score_names_its_unit_and_scorer_in_code_and_docs():
    numbers = {
        name for name, field in ClipScores.model_fields.items() if field.annotation == float | None
    }
    assert set(SCORES) == numbers | {"duration_s", "width_px", "height_px", "fps"}
    assert all(item.scorer and item.unit for item in SCORES.values())
    documented = (Path(__file__).parents[4] / "docs" / "filters.md").read_text("utf-8")
    for name, known in SCORES.items():
        assert f"| `{name}` | `{known.scorer}` | {known.unit} |" in documented
    for recipe in load_recipes():
        assert f"| `{recipe.name}` | {recipe.title} | " in documented
    item = clip(extra={"nima/aesthetic": 5.5}, sharpness=7.0, flicker=None)
    assert score_of(item, SCORES["sharpness"].scorer, "sharpness") == 7.0
    assert score_of(item, SCORES["flicker"].scorer, "flicker") is None
    assert score_of(item, "clip-file", "duration_s") == 1.0
    assert score_of(item, "nima", "aesthetic") == 5.5
    # the column is there, but of another scorer
    assert score_of(item, "nima", "sharpness") is None


# --- rules


def rule(**values):
    return {"score": "aesthetic", "scorer": "nima", **values}


def rated(*ratings, **changes):
    return [
        clip(f"{place:03}", extra={} if value is None else {"nima/aesthetic": value}, **changes)
        for place, value in enumerate(ratings)
    ]


def kept(clips, *rules, **changes):
    """Places of the clips that rules keep, and the judgement."""
    judged = judge_clips(clips, only(rules=rules, **changes))
    return [place for place, reason in enumerate(judged.reasons) if reason is None], judged


def test_a_rule_rejects_and_says_which_score_decided():
    places, judged = kept(rated(1.0, 4.0, 9.0, None), rule(least=4.0, greatest=8.0))
    assert places == [1]
    assert judged.reasons == [
        "too_low:nima/aesthetic",
        None,
        "too_high:nima/aesthetic",
        "not_measured:nima/aesthetic",
    ]
    (limit,) = judged.thresholds
    assert (limit.key, limit.least, limit.greatest) == ("rules.0", 4.0, 8.0)
    assert not limit.is_relative


def test_what_is_no_number_is_not_measured():
    assert kept(rated(float("nan"), 4.0), rule(least=0.0))[0] == [1]


@pytest.mark.parametrize(
    ("limits", "places", "resolved"),
    [
        ({"least_percentile": 10}, [*range(1, 10)], (1.0, None)),
        ({"least_percentile": 9.9}, [*range(10)], (0.0, None)),
        ({"least_percentile": 0}, [*range(10)], (0.0, None)),
        ({"least_percentile": 100}, [9], (9.0, None)),
        ({"greatest_percentile": 90}, [*range(9)], (None, 8.0)),
        ({"greatest_percentile": 0}, [0], (None, 0.0)),
        ({"least_percentile": 20, "greatest_percentile": 50}, [2, 3, 4], (2.0, 4.0)),
        ({"keep_fraction": 0.3}, [7, 8, 9], (7.0, None)),
        ({"keep_fraction": 0.01}, [9], (9.0, None)),
        ({"keep_fraction": 0.25, "keep": "least"}, [0, 1, 2], (None, 2.0)),
        ({"keep_fraction": 1.0}, [*range(10)], (0.0, None)),
    ],
)
def test_percentiles_and_shares_become_numbers(limits, places, resolved):
    values = np.random.default_rng(0).permutation(10).astype(float)
    found, judged = kept(rated(*values), rule(**limits))
    assert sorted(values[found]) == places
    (limit,) = judged.thresholds
    assert (limit.least, limit.greatest) == resolved
    assert limit.is_relative
    # the record says all: the same numbers as plain limits keep the same clips
    again = rule(
        **{
            name: value
            for name, value in (("least", limit.least), ("greatest", limit.greatest))
            if value is not None
        }
    )
    assert kept(rated(*values), again)[0] == found


def test_clips_at_the_limit_are_all_kept():
    assert kept(rated(1, 2, 2, 2, 3), rule(keep_fraction=0.4))[0] == [1, 2, 3, 4]


def test_shares_are_of_the_clips_that_pass_the_numbers_and_are_no_copies():
    clips = [*rated(1, 2, 3, 4), *rated(5, 6, 7, 8, luminance=1.0)]
    clips[4:] = [
        item.model_copy(update={"clip_id": f"dark{i}"}) for i, item in enumerate(clips[4:])
    ]
    half = rule(keep_fraction=0.5)
    assert kept(clips, half)[0] == [4, 5, 6, 7]
    assert kept(clips, half, min_luminance=16.0)[0] == [2, 3]
    assert kept(clips, half, rule(greatest=2.0))[0] == [1]
    # two shares look at the same clips, whatever their order
    both = (half, rule(keep_fraction=0.75, keep="least"))
    assert kept(clips, *both)[0] == kept(clips, *both[::-1])[0] == [4, 5]
    copies = [*clips[:4], clips[0], clips[0], clips[0], clips[0]]
    assert kept(copies, half, drop_duplicates=True)[0] == [2, 3]


def test_a_rule_on_what_every_clip_has():
    sharp = {"score": "sharpness", "scorer": SCORES["sharpness"].scorer, "least": 50.0}
    long = {"score": "duration_s", "scorer": "clip-file", "least": 0.5}
    assert kept([clip(sharpness=49.0), clip("b")], sharp, long)[0] == [1]


def test_another_scorer_is_refused_and_both_are_named():
    clips = rated(1.0)
    config = only(rules=[{"score": "motion", "scorer": "unimatch-flow", "least": 3.0}])
    with pytest.raises(ConfigError) as caught:
        judge_clips(clips, config)
    for part in (
        "unimatch-flow/motion for rules.0",
        "dis-flow-256px/motion_px_per_s",
        "enable the plug-in that measures it, or choose",
    ):
        assert part in str(caught.value)
    # not even with the name of a column that there is
    config = only(rules=[{"score": "sharpness", "scorer": "brisque", "least": 3.0}])
    with pytest.raises(ConfigError, match=r"brisque/sharpness .* laplacian-variance-clip-size"):
        judge_clips(clips, config)
    config = only(rules=[{"score": "aesthetic", "scorer": "laion", "least": 3.0}])
    with pytest.raises(ConfigError, match=r"laion/aesthetic .* nima/aesthetic"):
        judge_clips(clips, config)
    check_rules(config, {"laion/aesthetic"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a rule needs one of least, greatest"),
        ({"least": 2.0, "greatest": 1.0}, "least 2 must not exceed greatest 1"),
        ({"least_percentile": 60, "greatest_percentile": 40}, "must not exceed"),
        ({"keep_fraction": 0.0}, "greater than 0"),
        ({"least": float("nan")}, "finite"),
        ({"lest": 1.0}, "did you mean 'least'"),
    ],
)
def test_a_rule_that_says_nothing_sensible_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        SelectionRule.model_validate(rule(**values))


# --- recipes


def test_recipes_are_complete_and_say_where_they_are_from():
    assert sorted(item.name for item in load_recipes()) == sorted(RECIPES)
    for item in load_recipes():
        assert item.source.startswith("https://") == (not item.name.startswith("ursa-"))
        for part in item.rules:
            assert part.source
            if part.scorer in BUILT_IN_SCORERS:
                assert SCORES[part.score].scorer == part.scorer


def test_a_recipe_lists_every_scorer_that_is_missing():
    with pytest.raises(ConfigError) as caught:
        judge_clips([clip()], only(recipe="opensora-plan"))
    for part in (
        "lpips_frame_skip/motion for opensora-plan.0",
        "laion_aesthetic_v2/rating for opensora-plan.1",
        "dover/technical_quality for opensora-plan.2 (nothing like it is measured)",
        "or another recipe (`ursa data recipes`)",
    ):
        assert part in str(caught.value)


def test_a_recipe_applies_once_its_scorers_have_measured():
    good = {"laion_aesthetic_v2/rating": 6.0, "unimatch_flow/motion": 9.0}
    clips = [
        clip("a", extra=good),
        clip("b", extra=good | {"unimatch_flow/motion": 1.0}),
        clip("c", extra=good | {"laion_aesthetic_v2/rating": 4.9}),
    ]
    judged = judge_clips(clips, only(recipe="opensora"))
    assert judged.reasons == [
        None,
        "too_low:unimatch_flow/motion",
        "too_low:laion_aesthetic_v2/rating",
    ]
    assert all("353" in item.source for item in judged.thresholds)


def test_one_recipe_needs_nothing_but_what_is_always_measured():
    assert set(load_recipe("ursa-basic").scorers) <= BUILT_IN_SCORERS
    clips = [
        clip(f"{k:02}", info={"duration_s": 3.0}, sharpness=10.0 + k, motion_px_per_s=5.0 + k)
        for k in range(20)
    ]
    judged = judge_clips(clips, only(recipe="ursa-basic"))
    assert judged.reasons.count(None) == 18
    assert judged.reasons[0] == "too_low:laplacian-variance-clip-size/sharpness"


# --- near-duplicates


def hash_text(*frames):
    return "".join(f"{frame:016x}" for frame in frames)


def pictures(seed):
    """Hashes of five frames that have nothing in common."""
    values = np.random.default_rng(seed).integers(1, 1 << 63, 5)
    return [int(value) for value in values]


def flipped(value, bits):
    for bit in range(bits):
        value ^= 1 << (7 * bit + 3)
    return value


def shown(clip_id, frames, **changes):
    return clip(clip_id, perceptual_hash=hash_text(*frames), **changes)


def test_the_largest_then_longest_then_first_of_near_duplicates_is_kept():
    frames = pictures(0)
    near = [flipped(frame, 4) for frame in frames]
    large = {"width_px": 128}
    long = {"duration_s": 2.0}
    config = only(max_duplicate_distance=4)

    def survivor(*clips):
        reasons = judge_clips(clips, config).reasons
        assert reasons.count(RejectReason.NEAR_DUPLICATE) == len(clips) - 1
        return clips[reasons.index(None)].clip_id

    assert survivor(shown("a", frames), shown("b", near, info=large | long)) == "b"
    assert survivor(shown("a", frames, info=long), shown("b", near, info=large)) == "b"
    assert survivor(shown("a", frames), shown("b", near, info=long)) == "b"
    assert survivor(shown("b", near), shown("a", frames), shown("c", frames)) == "a"


@pytest.mark.parametrize(("distance", "number"), [(3, 2), (4, 1), (None, 2)])
def test_distance_is_that_of_most_frames(distance, number):
    frames = pictures(0)
    other = [*(flipped(frame, 4) for frame in frames[:3]), *pictures(1)[3:]]
    clips = [shown("a", frames), shown("b", other)]
    reasons = judge_clips(clips, only(max_duplicate_distance=distance)).reasons
    assert reasons.count(None) == number


def test_unrelated_clips_change_nothing_about_duplicates():
    frames = pictures(0)
    clips = [shown("a", frames), shown("b", frames), shown("c", pictures(1))]
    config = only(max_duplicate_distance=8)
    before = judge_clips(clips, config).reasons
    more = [shown(f"0{k}", pictures(10 + k), info={"width_px": 512}) for k in range(20)]
    assert judge_clips([*more, *clips], config).reasons[20:] == before
    assert before == [None, RejectReason.NEAR_DUPLICATE, None]


def test_a_rejected_clip_takes_no_place():
    """The better copy misses a limit, so the other one is kept."""
    frames = pictures(0)
    clips = [
        shown("a", frames, info={"width_px": 128}, luminance=1.0),
        shown("b", frames),
    ]
    config = only(max_duplicate_distance=4, min_luminance=16.0)
    assert judge_clips(clips, config).reasons == [RejectReason.TOO_DARK, None]


# --- the split


def test_sources_that_show_the_same_are_held_out_together():
    names = [f"{k:064x}" for k in range(60)]
    clips = [shown(f"{k:02}", pictures(k), source=name) for k, name in enumerate(names)]
    apart = judge_clips(clips, only(validation_fraction=0.3))
    place = apart.splits.index("validation")
    other = apart.splits.index("train")
    # a copy of a clip that is held out, in a source for training
    copy = shown("copy", pictures(place), source=names[other])
    config = only(validation_fraction=0.3, max_duplicate_distance=4)
    joined = judge_clips([*clips, copy], config)
    assert joined.reasons[-1] == RejectReason.NEAR_DUPLICATE
    assert joined.splits[place] == joined.splits[other] == "train"
    assert joined.splits[-1] is None
    unchanged = [k for k in range(60) if k != place]
    assert [joined.splits[k] for k in unchanged] == [apart.splits[k] for k in unchanged]


def test_sources_that_show_the_same_at_other_times_are_held_out_together():
    """Half of a long take, cut elsewhere: no near-duplicate, but one group."""
    names = [f"{k:064x}" for k in range(60)]
    rng = np.random.default_rng(0)
    long = rng.integers(1, 1 << 63, (60, 60), dtype=np.uint64)
    hashes = [row[:40].astype(">u8").tobytes() for row in long]
    clips = [
        shown(f"{k:02}", pictures(k), source=name, frame_hashes=hashes[k])
        for k, name in enumerate(names)
    ]
    apart = judge_clips(clips, only(validation_fraction=0.3, max_duplicate_distance=4))
    place, other = apart.splits.index("validation"), apart.splits.index("train")
    later = {"frame_hashes": long[place, 20:].astype(">u8").tobytes(), "source": names[other]}
    more = [*clips, shown("copy", pictures(99), **later)]
    mixed = rng.permutation(len(more)).tolist()
    for order in (range(len(more)), mixed):
        config = only(validation_fraction=0.3, max_duplicate_distance=4)
        judged = judge_clips([more[k] for k in order], config)
        assert judged.reasons == [None] * len(more)
        splits = dict(zip(order, judged.splits, strict=True))
        assert splits[place] == splits[other] == splits[60] == "train"
        assert [splits[k] for k in range(60) if k != place] == [
            split for k, split in enumerate(apart.splits) if k != place
        ]
    without = judge_clips(more, only(validation_fraction=0.3))
    assert without.splits[place] == "validation"


def groups_of(*names):
    return [{name} for name in names]


def test_validation_is_about_its_share():
    groups = groups_of(*(f"source{index}" for index in range(2000)))
    for seed in range(5):
        chosen = choose_validation_sources(groups, 0.2, seed=seed)
        assert 0.17 < len(chosen) / 2000 < 0.23
    again = choose_validation_sources(groups[::-1], 0.2, seed=1)
    assert choose_validation_sources(groups, 0.2, seed=1) == again
    assert again != choose_validation_sources(groups, 0.2, seed=2)


def test_small_sets():
    assert choose_validation_sources(groups_of("a"), 0.5, seed=0) == frozenset()
    assert choose_validation_sources(groups_of("a", "b"), 0.0, seed=0) == frozenset()
    assert choose_validation_sources([{"a", "b"}], 0.5, seed=0) == frozenset()
    assert len(choose_validation_sources(groups_of("a", "b"), 1e-9, seed=0)) == 1
    assert len(choose_validation_sources(groups_of("a", "b", "c"), 1.0, seed=0)) == 2


def test_a_clip_that_a_percentile_drops_still_joins_its_sources():
    """Percentiles move as clips come: who is held out must not change with them."""
    names = [f"{k:064x}" for k in range(60)]
    clips = [shown(f"{k:02}", pictures(k), source=name) for k, name in enumerate(names)]
    splits = judge_clips(clips, only(validation_fraction=0.3)).splits
    place, other = splits.index("validation"), splits.index("train")
    copy = shown("copy", pictures(place), source=names[other], sharpness=1.0)
    rule = {"scorer": "laplacian-variance-clip-size", "score": "sharpness", "least_percentile": 5}
    config = only(validation_fraction=0.3, max_duplicate_distance=4, rules=[rule])
    judged = judge_clips([*clips, copy], config)
    assert judged.reasons[-1] == "too_low:laplacian-variance-clip-size/sharpness"
    assert judged.splits[place] == judged.splits[other] == "train"


def test_what_is_held_out_has_clips():
    """A source whose clips a percentile drops is not the one that is held out of a few."""
    names = [f"{k:064x}" for k in range(3)]
    rule = {"scorer": "laplacian-variance-clip-size", "score": "sharpness", "least_percentile": 40}
    config = only(validation_fraction=1e-9, rules=[rule])
    for blurred in range(3):
        clips = [
            shown(str(k), pictures(k), source=name, sharpness=1.0 if k == blurred else 100.0)
            for k, name in enumerate(names)
        ]
        judged = judge_clips(clips, config)
        assert judged.reasons[blurred] is not None
        assert sorted(split for split in judged.splits if split) == ["train", "validation"]
