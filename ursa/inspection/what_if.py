"""What other thresholds would keep: stored scores are judged again, nothing is decoded."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ursa.artifacts import ClipSelection
from ursa.config import RunConfig
from ursa.data.clips import each_clip, read_selection_tables
from ursa.inspection.root import load_selection, version_of
from ursa.inspection.stats import FunnelRow, funnel
from ursa.video.selection import judge_clips


class ChangedClip(NamedTuple):
    """A clip with another verdict; a reason of None means that it is kept."""

    clip_id: str
    source_uri: str
    start_s: float
    end_s: float
    reason_now: str | None
    reason_then: str | None


_NAMED = ("clip_id", "source_uri", "start_s", "end_s")


class Outcome(NamedTuple):
    """What a selection keeps."""

    funnel: tuple[FunnelRow, ...]
    num_kept: int
    kept_s: float


class WhatIf(NamedTuple):
    """The selection as it is, as it would be, and the clips that make the difference."""

    selection_uri: str
    source_uri: str
    version: int | None
    now: Outcome
    then: Outcome
    gained: tuple[ChangedClip, ...]
    lost: tuple[ChangedClip, ...]


def what_if(root_uri: str, config: RunConfig, *, selection_uri: str | None = None) -> WhatIf:
    """Apply other thresholds to the stored scores of a selection.

    Args:
        root_uri: The data root.
        config: The run with the thresholds to try; `selection` matters.
        selection_uri: Manifest or folder of a selection; None takes the newest.

    Returns:
        Both outcomes and what changes; nothing is committed.

    Raises:
        ConfigError: If a rule needs a scorer that has not measured these clips.
        DataError: If there is no selection.
        ManifestError: If its manifest is damaged.
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    selection = load_selection(root_uri, selection_uri)
    table, verdicts = read_selection_tables(selection)
    reasons_now = verdicts["reason"].to_pylist()
    then = judge_clips(each_clip(table), config.selection)
    splits_now, splits_then = verdicts["split"].to_pylist(), then.splits
    reasons_then = then.reasons
    changed = [
        ChangedClip(
            **{name: table[name][place].as_py() for name in _NAMED},
            reason_now=now,
            reason_then=then,
        )
        for place, (now, then) in enumerate(zip(reasons_now, reasons_then, strict=True))
        if (now is None) != (then is None)
    ]
    durations_s = table["duration_s"].to_pylist()
    return WhatIf(
        selection_uri=selection.manifest_uri,
        source_uri=selection.clips.source_uri,
        version=version_of(root_uri, selection),
        now=_outcome(selection, durations_s, reasons_now, splits_now),
        then=_outcome(selection, durations_s, reasons_then, splits_then),
        gained=tuple(item for item in changed if item.reason_then is None),
        lost=tuple(item for item in changed if item.reason_then is not None),
    )


def _outcome(
    selection: ClipSelection,
    durations_s: Sequence[float],
    reasons: Sequence[str | None],
    splits: Sequence[str | None],
) -> Outcome:
    rejections = Counter(str(reason) for reason in reasons if reason is not None)
    kept_s = sum(
        seconds for seconds, reason in zip(durations_s, reasons, strict=True) if reason is None
    )
    counts = Counter(split for split in splits if split is not None)
    rows = funnel(selection.clips, rejections, counts["train"], counts["validation"])
    return Outcome(rows, counts.total(), kept_s)
