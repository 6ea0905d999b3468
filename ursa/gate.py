"""Whether a model may become champion: what it must beat, and by how little it may be worse.

The champion and the challenger are measured on the same held-out samples with the same noise; each
metric with a budget must be shown to be no worse than the champion's by more than that: the whole
95 % interval of the difference lies within the budget (non-inferiority). So a refusal needs no
proof of damage, a promotion needs one of none, and few samples, which make wide intervals, refuse.
Of a model that is worse by just the budget a metric passes in 2.5 to 3 % of the cases with eight
units or more, in 6 % with four stretches of footage (`ursa.bootstrap`). All metrics must pass, so
several of them make a wrong promotion less likely, not more, and need no correction.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple, cast

import numpy as np

from ursa.artifacts import (
    Comparison,
    HeldOutScores,
    LossGrid,
    MetricChange,
    MetricInterval,
)
from ursa.bootstrap import (
    MIN_SPANS,
    MIN_UNITS,
    Units,
    choose_units,
    describe_units,
    mean_interval,
)
from ursa.config import HeldOutMetric, ReleaseConfig, RunConfig
from ursa.training.validation import SETTING_PREFIX, comparable


class _Means(NamedTuple):
    """Values of the samples, shape (N,), of one metric."""

    metric: HeldOutMetric
    values: np.ndarray


def metric_intervals(scores: HeldOutScores) -> tuple[MetricInterval, ...]:
    """Return the held-out means of a model with their intervals.

    Args:
        scores: What it does on each sample.

    Returns:
        One interval a metric; none of too few samples.
    """
    units = choose_units(scores.source_ids, scores.clip_ids, scores.span_ids)
    if units is None:
        return ()
    found = []
    for metric, values in (mean for grid in scores.grids for mean in _means(grid)):
        low, high = mean_interval(values, units)
        found.append(MetricInterval(metric=metric, value=float(values.mean()), low=low, high=high))
    return tuple(found)


def compare(
    challenger: HeldOutScores,
    champion: HeldOutScores,
    *,
    champion_version: str,
    known_sources: Collection[str] | None,
    config: ReleaseConfig,
) -> Comparison:
    """Compare two models sample by sample.

    Args:
        challenger: What the new model does on each held-out sample.
        champion: What the present one does on the same samples, with the same noise.
        champion_version: Its version in the registry.
        known_sources: What the champion was trained on; samples of these sources are left out.
            None if that is not known.
        config: The budgets.

    Returns:
        The differences with their intervals; without a sample left, or of other samples, the
        problem.
    """
    held_out = set(challenger.source_ids)
    known = held_out & set(known_sources or ())
    kept = np.array([source not in known for source in challenger.source_ids])
    num_known = None if known_sources is None else len(known)
    if challenger.sample_ids != champion.sample_ids:
        problem = "they were measured on other samples"
        return not_compared(champion_version, problem, refuses=True)
    if not kept.any():
        problem = (
            f"it was trained on all {len(held_out)} sources that are held out now; add videos, "
            "hold out more (selection.validation_fraction), or promote by hand"
        )
        return not_compared(champion_version, problem, num_known_sources=num_known, refuses=True)

    def chosen(names: tuple[str, ...]) -> list[str]:
        return [name for name, is_kept in zip(names, kept, strict=True) if is_kept]

    units = choose_units(
        chosen(challenger.source_ids), chosen(challenger.clip_ids), chosen(challenger.span_ids)
    )
    changes = []
    for grid in challenger.grids:
        for other in champion.grids:
            if comparable(grid, other):
                for new, old in zip(_means(grid), _means(other), strict=True):
                    budget = config.budgets.get(new.metric)
                    changes.append(_change(new, old, kept, units, budget))
    return Comparison(
        champion_version=champion_version,
        problem=None if changes else "they were measured at other times",
        refuses=not changes,
        unit=None if units is None else units.kind,
        num_units=0 if units is None else units.num_units,
        num_samples=int(kept.sum()),
        num_known_sources=num_known,
        changes=tuple(changes),
    )


def not_compared(
    champion_version: str,
    problem: str,
    *,
    num_known_sources: int | None = None,
    refuses: bool = False,
) -> Comparison:
    """Return the record of a comparison that could not be made.

    Args:
        champion_version: Version of the champion in the registry.
        problem: Why, as the end of "version 3 cannot be compared: ...".
        num_known_sources: Held-out sources that the champion was trained on.
        refuses: Whether the challenger is refused for that.
    """
    return Comparison(
        champion_version=champion_version,
        problem=problem,
        refuses=refuses,
        unit=None,
        num_units=0,
        num_samples=0,
        num_known_sources=num_known_sources,
        changes=(),
    )


def comparison_metrics(
    intervals: tuple[MetricInterval, ...], comparison: Comparison | None
) -> dict[str, float]:
    """Return intervals and differences by name.

    Args:
        intervals: Of the model.
        comparison: With the champion.

    Returns:
        `eval/<metric>_low`, `eval/<metric>_high`: the 95 % interval; `eval/champion_<metric>` and
        `eval/vs_champion_<metric>`, the difference, with `_low` and `_high` of its own.
    """
    metrics: dict[str, float] = {}
    for item in intervals:
        metrics |= {f"eval/{item.metric}_low": item.low, f"eval/{item.metric}_high": item.high}
    for change in comparison.changes if comparison else ():
        name = f"eval/vs_champion_{change.metric}"
        metrics |= {f"eval/champion_{change.metric}": change.champion, name: change.difference}
        if change.low is not None and change.high is not None:
            metrics |= {f"{name}_low": change.low, f"{name}_high": change.high}
    return metrics


def failed_gates(
    metrics: Mapping[str, float], comparison: Comparison | None, config: RunConfig
) -> tuple[str, ...]:
    """Return the reasons why a model must not become champion; none means it may.

    Args:
        metrics: Those of `ursa.evaluation.held_out_metrics`, at least.
        comparison: With the present champion; None without one.
        config: The run; `evaluation.timesteps` and `release` matter.

    Returns:
        Reasons in words, losses in nats.
    """
    if "eval/loss" not in metrics:
        return (
            "no held-out clips to measure on; add videos or raise selection.validation_fraction",
        )
    failed = []
    for t in config.evaluation.timesteps:
        loss = metrics[f"eval/loss_t{t:g}"]
        if not np.isfinite(loss) or loss >= metrics[f"eval/untrained_loss_t{t:g}"]:
            failed.append(
                f"loss at t={t:g} is {loss:.3f}, not below the untrained model's "
                f"{metrics[f'eval/untrained_loss_t{t:g}']:.3f}"
            )
        elif t >= config.release.gate_min_timestep and loss >= metrics["eval/unigram_loss"]:
            failed.append(
                f"loss at t={t:g} is {loss:.3f}, not below the unigram's "
                f"{metrics['eval/unigram_loss']:.3f}"
            )
    failed += [
        f"{metric} is not finite"
        for metric, budget in config.release.budgets.items()
        if budget is not None and not np.isfinite(metrics.get(f"eval/{metric}", 0.0))
    ]
    if comparison is None:
        return tuple(failed)
    is_needed = comparison.refuses or config.release.require_comparison
    if comparison.problem is not None and is_needed:
        failed.append(comparison_text(comparison))
    judged = [change for change in comparison.changes if change.budget is not None]
    if judged and comparison.unit is None:
        failed.append(
            f"{comparison.num_samples} held-out samples are too few to compare with champion "
            f"version {comparison.champion_version}, at least {MIN_UNITS} are needed, of "
            f"{MIN_SPANS} stretches of footage that share no frames: add videos, raise "
            "selection.validation_fraction or evaluation.max_samples"
        )
    else:
        failed += [reason for change in judged if (reason := _refusal(change, comparison))]
    return tuple(failed)


def comparison_text(comparison: Comparison) -> str:
    """Return one line of what was compared, and what came out.

    Args:
        comparison: With the champion.
    """
    version = comparison.champion_version
    if comparison.problem is not None:
        return f"champion version {version} cannot be compared: {comparison.problem}"
    text = f"against champion version {version} on {_ground(comparison)}: "
    text += "; ".join(_signed(change) for change in comparison.changes)
    if comparison.num_known_sources:
        text += f"; {comparison.num_known_sources} sources that it was trained on are left out"
    elif comparison.num_known_sources is None:
        text += "; what it was trained on is not known"
    return text


def _means(grid: LossGrid) -> tuple[_Means, _Means]:
    """Return loss and accuracy of the samples of a grid."""
    prefix = SETTING_PREFIX[grid.setting]
    loss, accuracy = cast(
        tuple[HeldOutMetric, HeldOutMetric], (f"{prefix}loss", f"{prefix}accuracy")
    )
    return (
        _Means(loss, np.array(grid.sample_loss)),
        _Means(accuracy, np.array(grid.sample_accuracy)),
    )


def _change(
    new: _Means, old: _Means, kept: np.ndarray, units: Units | None, budget: float | None
) -> MetricChange:
    low, high = (
        (None, None) if units is None else mean_interval((new.values - old.values)[kept], units)
    )
    return MetricChange(
        metric=new.metric,
        champion=float(old.values[kept].mean()),
        challenger=float(new.values[kept].mean()),
        low=low,
        high=high,
        budget=budget,
    )


def _refusal(change: MetricChange, comparison: Comparison) -> str | None:
    """Return why a metric is refused: the end of its interval that is worse is past the budget."""
    assert change.low is not None
    assert change.high is not None
    assert change.budget is not None
    worse = -1.0 if change.metric.endswith("accuracy") else 1.0
    least, most = sorted((worse * change.low, worse * change.high))
    if most <= change.budget:
        return None
    name = change.metric.replace("_", " ")
    if least > change.budget:
        says, advice = "is worse", ""
    else:
        says, advice = "may be worse", "; more held-out clips would tell more"
    return (
        f"{name} {says} than that of champion version {comparison.champion_version}: "
        f"{change.challenger:.4g} against {change.champion:.4g}, a difference of {_spread(change)} "
        f"on {_ground(comparison)}, where it may be worse by {change.budget:g}{advice}"
    )


def _signed(change: MetricChange) -> str:
    return f"{change.metric.replace('_', ' ')} {_spread(change)}"


def _spread(change: MetricChange) -> str:
    text = f"{change.difference:+.4g}"
    if change.low is None or change.high is None:
        return f"{text} (no interval)"
    return f"{text} (95 % interval {change.low:+.4g} to {change.high:+.4g})"


def _ground(comparison: Comparison) -> str:
    text = f"{comparison.num_samples} samples"
    if comparison.unit is not None and comparison.unit != "sample":
        text += f" of {describe_units(comparison.unit, comparison.num_units)}"
    return text
