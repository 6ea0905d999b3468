"""Pictures of a data card: histograms of scores with their thresholds, strips as small images."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image

from ursa.artifacts import Threshold
from ursa.inspection.stats import score_names
from ursa.video.score_table import SCORES

KEPT_COLOUR, REJECTED_COLOUR, THRESHOLD_COLOUR = "#2a7f62", "#c9ced6", "#b3261e"
NUM_BINS = 40
_COLUMNS = 2


def score_histograms(
    clips: pa.Table, kept: np.ndarray, thresholds: Sequence[Threshold]
) -> bytes | None:
    """Draw a histogram for each score that was measured, kept clips below rejected ones.

    Args:
        clips: A table of clips.
        kept: Whether each clip is kept, shape (number of clips,), bool.
        thresholds: Limits that the selection applied, drawn as lines.

    Returns:
        A PNG; None if no score was measured.
    """
    names = [name for name in score_names(clips) if clips[name].null_count < clips.num_rows]
    if not names:
        return None
    num_rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(11, 2.5 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, _COLUMNS, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        _draw(axis, name, clips[name].to_numpy().astype(float), kept, thresholds)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(
    axis: Any, name: str, values: np.ndarray, kept: np.ndarray, thresholds: Sequence[Threshold]
) -> None:
    """Draw the histogram of one score; NaN is "not measured"."""
    is_measured = np.isfinite(values)
    parts = [values[is_measured & kept], values[is_measured & ~kept]]
    low, high = float(values[is_measured].min()), float(values[is_measured].max())
    width = high - low or 1.0
    axis.hist(
        parts,
        bins=NUM_BINS,
        range=(low, low + width),
        stacked=True,
        color=[KEPT_COLOUR, REJECTED_COLOUR],
        label=["kept", "rejected"],
    )
    for side, limit in _limits(name, thresholds):
        # a threshold far away would press the bars together
        if low - width <= limit <= high + width:
            axis.axvline(limit, color=THRESHOLD_COLOUR, linestyle="--", linewidth=1.4)
        else:
            place = {"x": 0.98 if limit > high else 0.02, "y": 0.9}
            align = "right" if limit > high else "left"
            text = f"{side} {limit:g}: not in the picture"
            axis.text(
                **place,
                s=text,
                color=THRESHOLD_COLOUR,
                ha=align,
                fontsize=8,
                transform=axis.transAxes,
            )
    axis.set_xlabel(f"{name}, {SCORES[name].unit}" if name in SCORES else name)
    axis.set_ylabel("clips")
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.get_major_locator().set_params(integer=True)


def _limits(name: str, thresholds: Sequence[Threshold]) -> list[tuple[str, float]]:
    """Return the sides and values of the limits on a score."""
    found = []
    for item in thresholds:
        if name == item.score and SCORES[name].scorer == item.scorer:
            found += [("min", item.least)] if item.least is not None else []
            found += [("max", item.greatest)] if item.greatest is not None else []
    return found


def jpeg(picture: np.ndarray) -> bytes:
    """Return a picture as a small JPEG.

    Args:
        picture: RGB, shape (H, W, 3), uint8.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=72)
    return buffer.getvalue()


def data_url(data: bytes, kind: str) -> str:
    """Return an image as a URL that holds it.

    Args:
        data: The file.
        kind: "png" or "jpeg".
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
