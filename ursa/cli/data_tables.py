"""Tables that `ursa data stats` and `ursa data what-if` print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ursa.data.versions import Change
from ursa.inspection.stats import QUANTILES
from ursa.texts import printable
from ursa.video.score_table import BUILT_IN_SCORERS

if TYPE_CHECKING:
    from ursa.data.versions import DatasetVersion
    from ursa.inspection.stats import DataStats, FunnelRow, Quantiles
    from ursa.inspection.what_if import ChangedClip, WhatIf
    from ursa.video.recipes import Recipe

_WIDTH = 110
_HEADS = {Change.RECAPTIONED: "captions"}
"""Of columns whose name would be too long."""


def print_stats(stats: "DataStats") -> None:
    """Print the counts of a selection.

    Args:
        stats: The counts.
    """
    console = Console(width=_WIDTH)
    _print_origin(console, stats)
    console.print(
        f"{'seconds':10} {stats.duration_s:,.1f} in {stats.num_clips:,} clips, "
        f"{stats.kept_duration_s:,.1f} in {stats.num_kept:,} kept"
    )
    console.print(
        f"{'bytes':10} {stats.media_bytes:,} clips, {stats.table_bytes:,} tables, "
        f"{stats.shard_bytes:,} token shards"
    )
    _print(console, ("funnel", "count", "%"), [_funnel_cells(row) for row in stats.funnel])
    _print(
        console,
        ("limits", "scorer", "least", "greatest", "number"),
        [
            (
                f"{item.key}: {item.score}" if "." in item.key else item.key,
                item.scorer,
                "" if item.least is None else f"{item.least:.6g}",
                "" if item.greatest is None else f"{item.greatest:.6g}",
                "from the clips" if item.is_relative else "as set",
            )
            for item in stats.thresholds
        ],
    )
    counts = {
        "resolution": stats.resolutions,
        "frames per second": stats.frame_rates,
        "captions from": stats.captions,
        "licence": stats.licences,
    }
    for name, values in counts.items():
        _print(console, (name, "clips"), [(key, f"{count:,}") for key, count in values.items()])
    _print(
        console,
        ("quantiles", "missing", *(f"{share:.0%}" for share in QUANTILES)),
        [
            _quantile_cells("duration, s", stats.clip_duration_s),
            *(_quantile_cells(name, part) for name, part in stats.scores.items()),
            *(_quantile_cells(f"{name}, kept", part) for name, part in stats.kept_scores.items()),
        ],
    )
    _print(
        console,
        ("tokens", "set", "samples", "tokens", "shards", "bytes"),
        [
            (
                f"{part.modality} {part.split} {size_of(part.latent_shape)}",
                part.manifest_uri.split("/")[-2][:8],
                *map("{:,}".format, (part.num_samples, part.num_tokens, part.num_shards)),
                f"{part.num_bytes:,}",
            )
            for part in stats.tokens
        ],
    )


def size_of(latent_shape: Sequence[int]) -> str:
    """Return a latent shape in words.

    Args:
        latent_shape: (T, H, W).
    """
    return "x".join(str(length) for length in latent_shape)


def print_versions(versions: Sequence["DatasetVersion"]) -> None:
    """Print one line a version, a table a source.

    Args:
        versions: All versions, by source and number.
    """
    console = Console(width=_WIDTH + 10)  # a column more than others have
    for source_uri in dict.fromkeys(version.source_uri for version in versions):
        console.print(Text(printable(source_uri)), soft_wrap=True)
        own = [version for version in versions if version.source_uri == source_uri]
        kinds = tuple(_HEADS.get(kind, str(kind)) for kind in Change)
        _print(
            console,
            ("version", "files", *kinds, "clips", "kept", "held out", "samples", "tokens"),
            [
                (
                    str(version.number),
                    *map(
                        "{:,}".format,
                        (
                            version.num_files,
                            *(version.changes.get(kind, 0) for kind in Change),
                            version.clips.num_clips,
                            version.selection.num_kept,
                            version.selection.num_validation,
                            sum(version.num_samples.values()),
                            version.num_tokens,
                        ),
                    ),
                )
                for version in own
            ],
        )


def print_what_if(result: "WhatIf", *, list_clips: bool) -> None:
    """Print both funnels and the difference.

    Args:
        result: The outcomes to compare.
        list_clips: Name the clips that make the difference.
    """
    console = Console(width=_WIDTH)
    _print_origin(console, result)
    now = _counts(result.now.funnel)
    then = _counts(result.then.funnel)
    steps = [*now, *(step for step in then if step not in now)]
    steps.sort(key=lambda step: (step.startswith(("clips kept", "kept")), not _is_before(step)))
    rows = [
        (step, f"{now.get(step, 0):,}", f"{then.get(step, 0):,}", _signed(step, now, then))
        for step in steps
    ]
    seconds = (result.now.kept_s, result.then.kept_s)
    difference = f"{seconds[1] - seconds[0]:+,.1f}"
    rows.append(("seconds kept", f"{seconds[0]:,.1f}", f"{seconds[1]:,.1f}", difference))
    _print(console, ("", "now", "then", "difference"), rows)
    console.print(f"{len(result.gained):,} clips more, {len(result.lost):,} clips less")
    if list_clips:
        for sign, clips in (("+", result.gained), ("-", result.lost)):
            for clip in clips:
                console.print(Text(printable(_clip_line(sign, clip))), soft_wrap=True)


def print_recipes(recipes: Sequence["Recipe"]) -> None:
    """Print what each recipe needs and does.

    Args:
        recipes: The recipes.
    """
    console = Console(width=_WIDTH)
    for recipe in recipes:
        needed = [scorer for scorer in recipe.scorers if scorer not in BUILT_IN_SCORERS]
        console.print(Text(f"{recipe.name}: {recipe.title}", style="bold"), soft_wrap=True)
        console.print(Text(f"  source  {recipe.source}"), soft_wrap=True)
        words = ", ".join(needed) or "nothing: all of its scores are always measured"
        console.print(Text(f"  needs   {words}"), soft_wrap=True)
        for rule in recipe.rules:
            limits = rule.model_dump(exclude={"score", "scorer", "source"}, exclude_defaults=True)
            words = ", ".join(f"{name} {value}" for name, value in limits.items())
            console.print(Text(f"  rule    {rule.score} of {rule.scorer}: {words}"), soft_wrap=True)
        console.print(Text(f"  note    {recipe.note}\n"), soft_wrap=True)


def _print_origin(console: Console, found: "DataStats | WhatIf") -> None:
    """Say which of the data of a root are meant."""
    version = "none has this selection" if found.version is None else found.version
    parts = (
        ("source", found.source_uri),
        ("version", version),
        ("selection", found.selection_uri),
    )
    for name, value in parts:  # texts of users are no markup
        console.print(Text(printable(f"{name:10} {value}")), soft_wrap=True)


def _is_before(step: str) -> bool:
    """Whether a row counts what comes before the thresholds."""
    return not step.startswith("rejected")


def _counts(rows: Sequence["FunnelRow"]) -> dict[str, int]:
    return {row.step: row.count for row in rows}


def _signed(step: str, now: Mapping[str, int], then: Mapping[str, int]) -> str:
    difference = then.get(step, 0) - now.get(step, 0)
    return f"{difference:+,}" if difference else ""


def _clip_line(sign: str, clip: "ChangedClip") -> str:
    reason = clip.reason_now if sign == "+" else clip.reason_then
    span = f"{clip.start_s:.2f} to {clip.end_s:.2f} s"
    return f"{sign} {clip.clip_id} {reason} {clip.source_uri} {span}"


def _funnel_cells(row: "FunnelRow") -> tuple[str, str, str]:
    percent = f"{100 * row.count / row.total:.1f}" if row.total else ""
    return row.step, f"{row.count:,}", percent


def _quantile_cells(name: str, part: "Quantiles") -> tuple[str, ...]:
    values = [f"{value:.4g}" for value in part.values] or [""] * len(QUANTILES)
    return name, f"{part.num_missing:,}" if part.num_missing else "", *values


def _print(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table unless it is empty."""
    if not rows:
        return
    table = Table(*head)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
