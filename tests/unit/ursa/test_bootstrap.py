import numpy as np
import pytest

from ursa.bootstrap import (
    FEW_UNITS_COVERAGE,
    MIN_SPANS,
    MIN_UNITS,
    Units,
    choose_units,
    describe_units,
    footage_spans,
    mean_interval,
)


def units_of(counts: list[int]) -> Units:
    return Units("source", tuple(str(unit) for unit, n in enumerate(counts) for _ in range(n)))


def coverage(num_units: int, *, by_unit: bool, repeats: int = 400) -> float:
    """Share of intervals that hold the true difference of two models, paired on the same samples.

    A source has an effect of its own on both models and one on their difference, so that samples of
    one source differ alike.
    """
    random = np.random.default_rng(num_units)
    true, held = 0.03, 0
    for _ in range(repeats):
        counts = [int(n) for n in random.integers(2, 7, num_units)]
        units = units_of(counts)
        ease = np.repeat(random.normal(5.0, 1.0, num_units), counts)
        effect = np.repeat(random.normal(true, 0.1, num_units), counts)
        champion = ease + random.normal(0, 0.3, len(ease))
        challenger = champion + effect + random.normal(0, 0.05, len(ease))
        alone = Units("sample", tuple(map(str, range(len(ease)))))
        low, high = mean_interval(challenger - champion, units if by_unit else alone)
        held += low <= true <= high
    return held / repeats


@pytest.mark.parametrize("num_units", [MIN_UNITS, 15, 40])
def test_interval_holds_the_true_difference_19_times_of_20(num_units):
    # three standard errors of 400 repeats: 0.033
    assert 0.915 < coverage(num_units, by_unit=True) < 0.985


@pytest.mark.parametrize(("num_units", "share"), [(4, 0.874), (5, 0.922), (8, 0.943)])
def test_few_units_hold_less_often_than_the_interval_says(num_units, share):
    """Of normal effects, one sample a unit."""
    random = np.random.default_rng(num_units)
    units, repeats = units_of([1] * num_units), 200
    ends = [mean_interval(random.normal(size=num_units), units) for _ in range(repeats)]
    held = sum(low <= 0 <= high for low, high in ends) / repeats
    assert held == pytest.approx(share, abs=3 * np.sqrt(share * (1 - share) / repeats))
    known = FEW_UNITS_COVERAGE.get(num_units)
    assert known is None or known == pytest.approx(100 * share, abs=0.5)


def test_four_units_have_no_interval_past_the_least_and_the_greatest():
    """So all four lie on one side of the truth, and the interval with them, once in eight."""
    values = np.array([3.0, -1.0, 7.0, 4.0])
    low, high = mean_interval(values, units_of([1] * 4))
    assert (low, high) == (-1.0, 7.0)


def test_what_is_said_of_few_units():
    assert describe_units("span", 4).endswith("holds in 87 % of the cases at best)")
    assert describe_units("source", MIN_UNITS) == "8 sources"
    assert set(FEW_UNITS_COVERAGE) == set(range(MIN_SPANS, MIN_UNITS))


def test_samples_of_a_source_are_not_taken_for_independent():
    assert coverage(15, by_unit=False) < 0.8 < coverage(15, by_unit=True)


def test_equal_models_differ_by_exactly_nothing():
    assert mean_interval(np.zeros(24), units_of([3] * 8)) == (0.0, 0.0)


def test_interval_is_repeatable_and_moves_with_the_values():
    units, values = units_of([1] * 10), np.random.default_rng(0).normal(size=10)
    low, high = mean_interval(values, units)
    assert mean_interval(values, units) == (low, high)
    assert low < values.mean() < high
    shifted = mean_interval(values + 5.0, units)
    assert shifted == pytest.approx((low + 5.0, high + 5.0))


@pytest.mark.parametrize(
    ("num_sources", "num_clips", "num_samples", "expected"),
    [(8, 8, 16, "source"), (7, 8, 16, "clip"), (1, 2, 8, "span"), (1, 2, 7, None)],
)
def test_the_largest_units_of_which_there_are_enough(num_sources, num_clips, num_samples, expected):
    names = [
        [str(i % count) for i in range(num_samples)]
        for count in (num_sources, num_clips, num_samples)
    ]
    found = choose_units(*names)
    assert (found and found.kind) == expected
    assert found is None or found.num_units >= MIN_UNITS


def test_windows_that_share_footage_are_drawn_by_stretches():
    """As the preset tiny holds them out: 38 windows of nine frames, one frame apart."""
    random = np.random.default_rng(0)
    clips, starts = ["a"] * 38, [place / 8 for place in range(38)]
    names = footage_spans(clips, starts, window_s=9 / 8)
    assert [names.count(f"a+{number}") for number in range(5)] == [9, 9, 9, 9, 2]
    spans = choose_units(clips, clips, names)
    assert spans is not None
    assert (spans.kind, spans.num_units) == ("span", 5)
    alone = Units("sample", tuple(map(str, range(38))))
    held = {"span": 0, "sample": 0}
    for _ in range(200):
        # half of what a window differs by is of its frames
        frames = np.convolve(random.normal(size=46), np.ones(9) / 3, "valid")
        values = frames + random.normal(size=38)
        for units in (spans, alone):
            low, high = mean_interval(values, units)
            held[units.kind] += low <= 0 <= high
    assert held["sample"] < 130 < 160 < held["span"]


def test_stretches_begin_anew_in_every_clip_and_where_windows_are_apart():
    clips, starts = ["b", "a", "a", "a", "a"], [0.5, 2.0, 0.0, 0.9, 1.0]
    assert footage_spans(clips, starts, window_s=1.0) == ("b+0", "a+2", "a+0", "a+0", "a+1")
