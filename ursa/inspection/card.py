"""A data card: one HTML file that shows what is in the data of a selection.

It holds everything itself (styles, pictures) and runs and loads nothing. All texts that come from
users (captions, file names) are escaped.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from ursa.artifacts import Clip, ClipSelection, SelectedClip
from ursa.config import RunConfig
from ursa.data.clips import clips_of, read_selection_tables
from ursa.data.versions import Change, changed_settings, list_versions
from ursa.errors import DataError
from ursa.inspection.examples import choose_examples, read_strip, verdict_of
from ursa.inspection.page import document, escape, funnel_table, section, table
from ursa.inspection.pictures import data_url, jpeg, score_histograms
from ursa.inspection.root import load_selection
from ursa.inspection.stats import DataStats, data_stats, resolutions
from ursa.tokenizers.text import motion_prompt
from ursa.video.decode import ReadFrames
from ursa.video.motion import MOTION_WIDTH_PX
from ursa.video.reader import ClipReader

DURATION_EDGES_S = (1.0, 2.0, 4.0, 8.0)
NUM_KEPT_EXAMPLES = 8
NUM_REJECTED_EXAMPLES = 3
"""For each reason."""
MOTION_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_RESOLUTIONS = 12


def data_card(
    root_uri: str, *, selection_uri: str | None = None, config: RunConfig | None = None
) -> str:
    """Return the data card of a selection.

    Args:
        root_uri: The data root.
        selection_uri: Manifest or folder of a selection; None takes the newest.
        config: What to try for token data sets without a recipe; None tries the presets.

    Returns:
        A whole HTML document; the same data give the same text.

    Raises:
        DataError: If there is no selection.
        ManifestError: If its manifest is damaged.
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    selection = load_selection(root_uri, selection_uri)
    stats = data_stats(root_uri, selection_uri=selection.manifest_uri, config=config)
    clips, verdicts = read_selection_tables(selection)
    histograms = score_histograms(clips, verdicts["kept"].to_numpy(), selection.thresholds)
    with ClipReader() as reader:
        motion = _motion(clips.filter(verdicts["kept"]), reader.read)
        kept = _examples(choose_examples(selection, NUM_KEPT_EXAMPLES, kept=True), reader.read)
        rejected = _examples(_rejected(selection), reader.read)
    parts = [
        _head(stats, selection),
        section("Changes since the version before", _changes(root_uri, selection)),
        section("From files to clips", funnel_table(stats.funnel)),
        section("Scores", _scores(histograms)),
        section("Thresholds", _thresholds(selection)),
        section("Motion", motion),
        section("Resolution and duration", _buckets(clips)),
        section("Captions", _counts("where they come from", stats.captions)),
        section("Licences", _counts("licence", stats.licences)),
        section("Tokens", _tokens(stats)),
        section("Kept clips", kept),
        section("Rejected clips", rejected),
    ]
    return document("Data card", parts)


def _head(stats: DataStats, selection: ClipSelection) -> str:
    num_tokens = sum(part.num_tokens for part in stats.tokens)
    num_sets = len({part.manifest_uri for part in stats.tokens})
    facts = (
        ("files", f"{stats.num_files:,}"),
        ("clips", f"{stats.num_clips:,}"),
        ("kept", f"{stats.num_kept:,}"),
        ("kept, minutes", f"{stats.kept_duration_s / 60:,.1f}"),
        ("tokens" if num_sets == 1 else f"tokens in {num_sets} sets", f"{num_tokens:,}"),
    )
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in facts)
    return (
        f'<h1>Data card</h1><div class="small">{escape(unquote(stats.source_uri))}<br>selection '
        f'{escape(selection.fingerprint[:16])}</div><div class="facts">{cells}</div>'
    )


def _changes(root_uri: str, selection: ClipSelection) -> str:
    """Return what the newest version of this selection has that the one before had not."""
    versions = list_versions(root_uri)
    own = [item for item in versions if item.selection.fingerprint == selection.fingerprint]
    if not own:
        return "<p>This selection is in no data set version.</p>"
    version = own[-1]
    words = {Change.RECAPTIONED: "captions changed"}
    rows = [
        (words.get(kind, str(kind)), f"{version.changes.get(kind, 0):,} files") for kind in Change
    ]
    rows.append(("as before", f"{version.num_unchanged:,} files"))
    parent = next((item for item in versions if item.manifest_uri == version.parent_uri), None)
    if settings := changed_settings(version, parent) if parent else []:
        rows.append(("settings changed", escape(", ".join(settings))))
    return table((f"version {version.number}", ""), rows)


def _scores(histograms: bytes | None) -> str:
    if histograms is None:
        return "<p>No score was measured.</p>"
    url = data_url(histograms, "png")
    text = "histograms of all scores"
    return (
        f'<img class="wide" alt="{text}" src="{url}">'
        '<div class="small">Dashed: the thresholds of this selection.</div>'
    )


def _thresholds(selection: ClipSelection) -> str:
    """Return every limit as it was applied, and what else decides."""
    config = selection.config
    rows = [
        (
            escape(item.key),
            escape(item.score),
            escape(item.scorer),
            "" if item.least is None else f"{item.least:.6g}",
            "" if item.greatest is None else f"{item.greatest:.6g}",
            "from the clips" if item.is_relative else "as set",
            escape(item.source or ""),
        )
        for item in selection.thresholds
    ]
    head = ("key", "score", "scorer", "least", "greatest", "number", "source")
    near = config.max_duplicate_distance
    words = (
        f"Recipe {config.recipe or 'none'}; copies with equal bytes "
        f"{'dropped' if config.drop_duplicates else 'kept'}; near-duplicates "
        f"{'kept' if near is None else f'within {near} bits dropped'}; share of sources to hold "
        f"out {config.validation_fraction:g}; seed of the split {config.split_seed}."
    )
    return f'{table(head, rows)}<div class="small">{escape(words)}</div>'


def _motion(kept: pa.Table, read: ReadFrames) -> str:
    """Return what a number of `motion=...` in a prompt means: clips from still to fast."""
    moving = kept.filter(pc.is_finite(kept["motion_px_per_s"])).sort_by("motion_px_per_s")
    if not moving.num_rows:
        return "<p>The motion of no kept clip was measured.</p>"
    rows = []
    for share in MOTION_SHARES:
        (clip,) = clips_of(moving.slice(round(share * (moving.num_rows - 1)), 1))
        parts = (clip.scores.camera_motion_px_per_s, clip.scores.object_motion_px_per_s)
        rows.append(
            (
                f"{share:.0%}",
                motion_prompt("...", clip.scores.motion_px_per_s),
                *("" if part is None else f"{part:.1f}" for part in parts),
                _strip(clip, read),
            )
        )
    head = ("of kept clips move less", "prompt", "camera, px/s", "objects, px/s", "frames")
    words = (
        f"Mean length of the optical flow on pictures {MOTION_WIDTH_PX} px wide, in px/s, which is "
        "the number that prompts are trained with. Ask for what these clips have: beyond the last "
        "row there is hardly anything to learn from. Of pans of known speed it measures 0.96 times "
        "the speed (median; Spearman 0.989, docs/filters.md)."
    )
    return f'{table(head, rows, kind="motion")}<div class="small">{words}</div>'


def _buckets(clips: pa.Table) -> str:
    """Return clips by resolution (down) and duration (across)."""
    edges = (0.0, *DURATION_EDGES_S, float("inf"))
    spans = list(itertools.pairwise(edges))
    names = [f"{low:g} to {high:g} s" for low, high in spans[:-1]] + [f"{edges[-2]:g} s and more"]
    sizes, durations = resolutions(clips), clips["duration_s"].to_pylist()
    common = [size for size, _ in Counter(sizes).most_common(_MAX_RESOLUTIONS)]
    counts: Counter[tuple[str, int]] = Counter()
    for size, duration_s in zip(sizes, durations, strict=True):
        place = next(i for i, (low, high) in enumerate(spans) if low <= duration_s < high)
        counts[size if size in common else "others", place] += 1
    rows = []
    for size in [*common, *(["others"] if len(set(sizes)) > len(common) else [])]:
        row = [counts[size, place] for place in range(len(spans))]
        rows.append((escape(size), *(f"{count:,}" if count else "" for count in row), sum(row)))
    return table(("resolution", *names, "all"), rows)


def _counts(name: str, counts: dict[str, int]) -> str:
    rows = [(escape(value), f"{count:,}") for value, count in counts.items()]
    return table((name, "clips"), rows)


def _tokens(stats: DataStats) -> str:
    if not stats.tokens:
        return "<p>No tokens of this selection are committed, or their settings are not known.</p>"
    rows = [
        (
            f"{part.modality}, {part.split}",
            "x".join(map(str, part.latent_shape)),
            escape(part.manifest_uri.split("/")[-2][:8]),
            f"{part.num_samples:,}",
            f"{part.num_tokens:,}",
            f"{part.num_shards:,}",
            f"{part.num_bytes / 1e6:,.2f}",
        )
        for part in stats.tokens
    ]
    head = ("data set", "latent size", "of", "samples", "tokens", "shards", "MB")
    lost = {
        part.manifest_uri: f"{part.manifest_uri.split('/')[-2][:8]}: of the kept clips "
        f"{part.num_failed_clips:,} could not be tokenized, {part.num_short_clips:,} are too short "
        "for a video sample and give images alone."
        for part in stats.tokens
    }
    words = "<br>".join(map(escape, lost.values()))
    return f'{table(head, rows)}<div class="small">{words}</div>'


def _rejected(selection: ClipSelection) -> list[SelectedClip]:
    return [
        item
        for reason in sorted(selection.rejections)
        for item in choose_examples(selection, NUM_REJECTED_EXAMPLES, kept=False, reason=reason)
    ]


def _examples(examples: Sequence[SelectedClip], read: ReadFrames) -> str:
    if not examples:
        return "<p>None.</p>"
    return f'<div class="grid">{"".join(_example(item, read) for item in examples)}</div>'


def _strip(clip: Clip, read: ReadFrames) -> str:
    try:
        url = data_url(jpeg(read_strip(clip, read)), "jpeg")
    except DataError:
        return '<div class="none">the clip is missing, damaged or not to be decoded</div>'
    return f'<img alt="frames of the clip" src="{url}">'


def _example(item: SelectedClip, read: ReadFrames) -> str:
    clip = item.clip
    scores = ", ".join(
        f"{name} {value:,.0f}" if abs(value) >= 100 else f"{name} {value:.3g}"
        for name, value in (clip.scores.model_dump() | clip.extra_scores).items()
        if isinstance(value, float)
    )
    name = unquote(clip.source_uri.rpartition("/")[2])
    tag = "" if item.kept else " lost"
    verdict = f"kept, {item.split}" if item.kept else verdict_of(item)
    return (
        f'<figure>{_strip(clip, read)}<figcaption><span class="tag{tag}">{escape(verdict)}</span> '
        f"{escape(clip.caption or 'no caption')}"
        f'<div class="small">{escape(name)}, {clip.start_s:.2f} to {clip.end_s:.2f} s<br>'
        f"{escape(scores)}</div></figcaption></figure>"
    )
