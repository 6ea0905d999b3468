"""Curves of an evaluation: quality against steps, produced against asked motion."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ursa.artifacts import Measure, Measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = ("i2v_later_psnr", "i2v_later_ssim", "t2v_energy_distance")


class _Curve(NamedTuple):
    title: str
    x_label: str
    points: list[tuple[float, Measure]]


def draw_curves(measurements: Measurements, *, num_steps: int) -> bytes | None:
    """Draw what there is of quality against steps and of motion, with intervals.

    Args:
        measurements: Of a model.
        num_steps: Steps of the sampler where a metric does not name them.

    Returns:
        PNG; None if there is no curve of two points or more.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (half a second, rarely needed)

    by_name = {item.metric: item for item in measurements.measures}
    asked = _numbered(by_name, r"asked(.+)_motion")
    curves = [_Curve("produced motion", "asked motion, px/s", asked)]
    for metric in _STEPS:
        points = _numbered(by_name, rf"steps(\d+)_{metric}")
        if metric in by_name:
            points.append((num_steps, by_name[metric]))
        curves.append(_Curve(metric, "steps", sorted(points, key=lambda point: point[0])))
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return None
    figure = Figure(figsize=(3.4 * len(curves), 3.0), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        _draw(axes, curve)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def _numbered(by_name: Mapping[str, Measure], pattern: str) -> list[tuple[float, Measure]]:
    """Return the metrics whose name holds a number, by it."""
    found = ((re.fullmatch(pattern, name), item) for name, item in by_name.items())
    return sorted(((float(m[1]), item) for m, item in found if m), key=lambda point: point[0])


def _draw(axes: "Axes", curve: _Curve) -> None:
    places: Sequence[float] = [place for place, _ in curve.points]
    measures = [measure for _, measure in curve.points]
    axes.plot(places, [item.value for item in measures], marker="o", color="tab:blue")
    for place, item in curve.points:
        if item.low is not None and item.high is not None:
            axes.vlines(place, item.low, item.high, color="tab:blue", alpha=0.5)
    axes.set(title=curve.title, xlabel=curve.x_label, ylabel=measures[0].unit)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
