"""Metrics by name: unit, which way is better, interval, and the difference between two models."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ursa.artifacts import Measure, MeasuredCases, Measurements
from ursa.bootstrap import Unit, Units, largest_units, mean_interval, statistic_interval

Better = Literal["higher", "lower"] | None


class Definition(NamedTuple):
    """What a metric is.

    Attributes:
        unit: Of its values.
        better: Which way is better; None if neither is.
    """

    unit: str
    better: Better


_OF_CLIPS = {
    "temporal_flicker": Definition("in [0, 1]", "higher"),
    "motion_smoothness": Definition("in [0, 1]", "higher"),
    "motion": Definition("px/s at 256 px width", None),
    "dynamic_degree": Definition("share of clips", None),
    "sharpness": Definition("levels squared", None),
    "luminance_flicker": Definition("levels", "lower"),
}
_OTHERS = {
    "loss": Definition("nats", "lower"),
    "accuracy": Definition("in [0, 1]", "higher"),
    "psnr": Definition("dB", "higher"),
    "ssim": Definition("in [-1, 1]", "higher"),
    "token_accuracy": Definition("in [0, 1]", "higher"),
    "motion_adherence": Definition("rank correlation in [-1, 1]", "higher"),
    "diversity": Definition("levels", None),
    "nearest_train_distance": Definition("levels", None),
    "nearest_train_ratio": Definition("ratio", None),
    "energy_distance": Definition("levels", "lower"),
    "frechet_statistics": Definition("squared deviations", "lower"),
    "frechet_network": Definition("squared deviations", "lower"),
    "frechet_latents": Definition("squared deviations", "lower"),
    "code_usage": Definition("share of codes", "higher"),
    "code_perplexity": Definition("codes", "higher"),
}
_DEFINITIONS = _OF_CLIPS | _OTHERS
_BENCHMARKS = ("vbench_", "geneval_", "dpg_")


def define(metric: str) -> Definition:
    """Return unit and direction of a metric: those of the longest known end of its name.

    Scores of benchmarks are theirs.

    Args:
        metric: Such as `i2v_later_psnr` or `steps4_energy_distance`.

    Raises:
        KeyError: If no end of it is known.
    """
    if metric.startswith(_BENCHMARKS):
        return Definition("score", "higher")
    parts = metric.split("_")
    for start in range(len(parts)):
        found = _DEFINITIONS.get("_".join(parts[start:]))
        if found is None and start == len(parts) - 1:
            # tokenizer_psnr_train: the last word says of what
            found = _DEFINITIONS.get(re.sub(r"^.*_(\w+)_(?:train|validation)$", r"\1", metric))
        if found is not None:
            return found
    raise KeyError(metric)


def group_cases(
    name: str, cases: Sequence[str], levels: Sequence[tuple[Unit, Sequence[str]]]
) -> MeasuredCases:
    """Return cases with what the bootstrap draws as a whole.

    Args:
        name: Of the group.
        cases: Names of the cases.
        levels: As `ursa.bootstrap.largest_units` takes them, without the cases themselves: where
            these share footage, their spans are the last level.
    """
    shares_footage = any(kind == "span" for kind, _ in levels)
    units = largest_units(levels if shares_footage else (*levels, ("sample", cases)))
    return MeasuredCases(
        name=name,
        cases=tuple(cases),
        units=tuple(cases) if units is None else units.names,
        unit=None if units is None else units.kind,
    )


def mean_measure(metric: str, values: Sequence[float], group: MeasuredCases) -> Measure:
    """Return a mean over cases with its interval.

    Args:
        metric: Name.
        values: By case.
        group: The cases.
    """
    array = np.asarray(values, np.float64)
    ends = None if group.unit is None else mean_interval(array, _units(group))
    return _measure(metric, float(array.mean()), ends, group.name, tuple(array.tolist()))


def statistic_measure(
    metric: str, statistic: Callable[[np.ndarray], float], group: MeasuredCases
) -> Measure:
    """Return a number that is no mean over cases, with its interval.

    Args:
        metric: Name.
        statistic: Takes how often each case counts, shape (N,).
        group: The cases.
    """
    value = statistic(np.ones(len(group.cases)))
    ends = None if group.unit is None else statistic_interval(statistic, _units(group))
    return _measure(metric, value, ends, group.name, ())


def plain_measure(metric: str, value: float) -> Measure:
    """Return a number that is counted, not drawn: it has no interval.

    Args:
        metric: Name.
        value: Number.
    """
    return _measure(metric, value, None, None, ())


def measurement_metrics(measurements: Measurements) -> dict[str, float]:
    """Return values and ends of intervals by name, as MLflow has them.

    Args:
        measurements: Of a model.

    Returns:
        `eval/<metric>`, `eval/<metric>_low`, `eval/<metric>_high`.
    """
    metrics: dict[str, float] = {}
    for item in measurements.measures:
        metrics[f"eval/{item.metric}"] = item.value
        if item.low is not None and item.high is not None:
            metrics |= {f"eval/{item.metric}_low": item.low, f"eval/{item.metric}_high": item.high}
    return metrics


def join(*parts: Measurements) -> Measurements:
    """Return several measurements as one.

    Args:
        *parts: Of one model.
    """
    return Measurements(
        measures=tuple(item for part in parts for item in part.measures),
        cases=tuple(group for part in parts for group in part.cases),
    )


_OF_HELD_OUT = ("real_", "still_")
"""Begins the names of metrics of held-out clips, which are those of any model."""


class Difference(NamedTuple):
    """A metric of a model less that of another, case by case.

    Attributes:
        metric: Name.
        value: The difference.
        low: Lower end of its 95 % interval; None of too few cases.
        high: Upper end.
        verdict: What the interval says of the model.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    verdict: Literal["better", "worse", "higher", "lower", "not told apart"]


def differences(model: Measurements, other: Measurements) -> list[Difference]:
    """Return the differences of two models in metrics that are means over the same cases.

    Args:
        model: A model.
        other: Another, measured on the same data with the same seed.
    """
    groups = {group.name: group for group in model.cases}
    before = {item.metric: item for item in other.measures}
    left = {metric for metrics in left_out(model, other).values() for metric in metrics}
    found = []
    for item in model.measures:
        if item.metric in left or item.cases is None or item.metric.startswith(_OF_HELD_OUT):
            continue
        group, old = groups[item.cases], before[item.metric]
        change = np.subtract(item.values, old.values)
        low, high = (None, None) if group.unit is None else mean_interval(change, _units(group))
        verdict = _verdict(low, high, item.better)
        found.append(Difference(item.metric, float(change.mean()), low, high, verdict))
    return found


def left_out(model: Measurements, other: Measurements) -> dict[str, list[str]]:
    """Return the metrics of which `differences` has none.

    Args:
        model: A model.
        other: Another.

    Returns:
        Names of metrics by the reason.
    """
    own = {item.metric: item for item in model.measures}
    before = {item.metric: item for item in other.measures}
    groups = {group.name: group for group in model.cases}
    theirs = {group.name: group for group in other.cases}
    found = defaultdict(list)
    for metric in dict.fromkeys((*own, *before)):
        if metric.startswith(_OF_HELD_OUT):
            continue
        item, old = own.get(metric), before.get(metric)
        if item is None or old is None:
            found["measured of one of the two"].append(metric)
        elif item.cases is None or not item.values:
            found["no means over cases"].append(metric)
        elif groups[item.cases] != theirs.get(item.cases) or len(item.values) != len(old.values):
            found["measured on other clips"].append(metric)
    return dict(found)


def _verdict(
    low: float | None, high: float | None, better: Better
) -> Literal["better", "worse", "higher", "lower", "not told apart"]:
    if low is None or high is None or low <= 0 <= high:
        return "not told apart"
    is_higher = low > 0
    if better is None:
        return "higher" if is_higher else "lower"
    return "better" if is_higher == (better == "higher") else "worse"


def _units(group: MeasuredCases) -> Units:
    assert group.unit is not None
    return Units(group.unit, group.units)


def _measure(
    metric: str,
    value: float,
    ends: tuple[float, float] | None,
    cases: str | None,
    values: tuple[float, ...],
) -> Measure:
    low, high = ends or (None, None)
    unit, better = define(metric)
    return Measure(
        metric=metric,
        value=value,
        low=low,
        high=high,
        unit=unit,
        better=better,
        cases=cases,
        values=values,
    )
