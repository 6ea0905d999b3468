"""Prefect artifacts: what a person sees on the page of a run.

Keys are part of the public interface. A report is a courtesy: when the Prefect server does not
take it, the work goes on. Outside of a flow run nothing is reported.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import PrefectHTTPStatusError

from tasks.options import root_flow_run_id
from ursa.artifacts import (
    ClipSelection,
    ClipSet,
    EvalReport,
    IngestedVideo,
    Measure,
    MetricInterval,
    ModelVersion,
    SelectedClip,
    TokenDatasets,
)
from ursa.bootstrap import describe_units
from ursa.data.versions import DatasetVersion, FileChange
from ursa.decisions import who
from ursa.drift import Drift
from ursa.texts import markdown_code, markdown_text
from ursa.video.selection import explain

logger = logging.getLogger(__name__)

UPDATE_EVERY_S = 5.0
EXAMPLES = 8
CHANGES = 250
_HEADLINES = (
    *(f"eval/{key}" for key in ("loss", "unigram_loss", "accuracy", "i2v_loss", "async_loss")),
    "eval/tokenizer_psnr_validation",
)
"""Metrics that stand first in a table of all."""
_IS_ONE_CELL = re.compile(r"_(t0(\.\d+)?|frame\d+)$")
"""Metrics of one time or latent frame: fifty numbers that a heat map in MLflow shows better."""


def _without_patience() -> SettingsContext:
    """Return settings with which a call to a server that is away fails at once: work goes on."""
    context = get_settings_context()
    # `temporary_settings` validates all settings anew, which takes a tenth of a second
    client = context.settings.client.model_copy(update={"max_retries": 0})
    settings = context.settings.model_copy(update={"client": client})
    return context.model_copy(update={"settings": settings})


@contextlib.contextmanager
def _courtesy() -> Iterator[None]:
    try:
        with _without_patience():
            yield
    except (httpx.HTTPError, PrefectHTTPStatusError, OSError) as error:
        logger.warning("a report could not be stored: %s", error)


def in_flow_run() -> bool:
    """Whether there is a flow run to report to."""
    return runtime.flow_run.id is not None


def flow_run_tags() -> dict[str, str]:
    """Return what leads from the tracking server to the flow run."""
    if not in_flow_run():
        return {}
    root = root_flow_run_id()
    base = str(runtime.flow_run.ui_url or "").rpartition("/")[0]
    return {"prefect.flow_run_id": str(root), "prefect.flow_run_url": f"{base}/{root}"}


def decided_by() -> str:
    """Return who decides about versions here: see `ursa.decisions.who`."""
    return who(flow_run_tags().get("prefect.flow_run_id"))


def start_progress(key: str, description: str) -> UUID | None:
    """Create a progress artifact at 0 percent.

    Args:
        key: Key of the artifact: lower case, digits and dashes.
        description: What is under way, in Markdown.

    Returns:
        Id of the artifact; None outside of a flow run or if the server does not take it.
    """
    if not in_flow_run():
        return None
    with (
        contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError, OSError),
        _without_patience(),
    ):
        return UUID(str(create_progress_artifact(progress=0.0, key=key, description=description)))
    return None


def set_progress(artifact_id: UUID | None, percent: float, description: str) -> None:
    """Update a progress artifact.

    Args:
        artifact_id: What `start_progress` returned; with None nothing is done.
        percent: Progress; more than 100 counts as 100.
        description: What is under way, in Markdown.
    """
    if artifact_id is None:
        return
    with _courtesy():
        update_progress_artifact(
            artifact_id=artifact_id, progress=min(percent, 100.0), description=description
        )


@contextlib.contextmanager
def progress(
    key: str, what: str, *, total: int, before: int = 0
) -> Iterator[Callable[[int, int], None]]:
    """Report the progress of units of work, at most every 5 s, with the time left.

    Args:
        key: Key of the artifact.
        what: Plural noun of the units.
        total: How many there are.
        before: Units that were done earlier and count as done.

    Yields:
        A function of (units done now, units to do now).
    """
    artifact_id = start_progress(key, f"{before} of {total} {what}")
    began = last = time.monotonic()
    text = what

    def advance(done: int, total: int) -> None:
        nonlocal last, text
        now = time.monotonic()
        left_s = (now - began) / max(done, 1) * (total - done)
        text = f"{before + done} of {before + total} {what}, {left_s:.0f} s left"
        if now - last >= UPDATE_EVERY_S:
            last = now
            set_progress(artifact_id, 100 * (before + done) / max(before + total, 1), text)

    yield advance
    known = f"; {before} were known" if before else ""
    spent_s = time.monotonic() - began
    set_progress(artifact_id, 100.0, f"{total - before} {what}: done in {spent_s:.0f} s{known}")


@contextlib.contextmanager
def step_progress(key: str, max_steps: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Report the progress of a fit, at most every 5 s.

    Args:
        key: Key of the artifact.
        max_steps: Steps of the fit.

    Yields:
        A function of (steps done, metrics); `tokenizer/psnr` in dB is shown, if it is there.
    """
    artifact_id = start_progress(key, f"step 0 of {max_steps}")
    began = time.monotonic()
    last = 0.0

    def advance(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last < UPDATE_EVERY_S:
            return
        last = time.monotonic()
        psnr = metrics.get("tokenizer/psnr")
        text = f"step {step} of {max_steps}"
        text += "" if psnr is None else f", PSNR {psnr:.1f} dB"
        set_progress(artifact_id, 100 * step / max(max_steps, 1), text)

    yield advance
    set_progress(artifact_id, 100.0, f"done in {time.monotonic() - began:.0f} s")


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """Store a table; Prefect shows texts in it as Markdown, so they are escaped.

    Args:
        key: Key of the artifact: lower case, digits and dashes.
        rows: Values by column name.
        description: What it shows, in Markdown.
    """
    if in_flow_run():
        with _courtesy():
            shown = [
                {
                    name: markdown_text(value) if isinstance(value, str) else value
                    for name, value in row.items()
                }
                for row in rows
            ]
            create_table_artifact(shown, key=key, description=description)


def markdown(key: str, text: str, description: str) -> None:
    """Store a page of markdown.

    Args:
        key: Key of the artifact: lower case, digits and dashes.
        text: The page.
        description: What it shows, in Markdown.
    """
    if in_flow_run():
        with _courtesy():
            create_markdown_artifact(text, key=key, description=description)


def link(key: str, url: str, text: str, description: str) -> None:
    """Store a link.

    Args:
        key: Key of the artifact: lower case, digits and dashes.
        url: Where it leads.
        text: What is shown of it.
        description: What it leads to, in Markdown.
    """
    if in_flow_run():
        with _courtesy():
            shown = markdown_text(text)  # Prefect writes it into Markdown as it is
            create_link_artifact(url, link_text=shown, key=key, description=description)


def drift(measured: Drift, least: float | None) -> None:
    """Store how far the new clips of a retraining are from those of the champion, by score.

    Args:
        measured: The distances.
        least: `retraining.min_drift`.
    """
    rule = "it trains whatever they are" if least is None else f"it trains from {least:g} on"
    table(
        "data-drift",
        [
            {"score": name, "distance": f"{value:.3f}"}
            for name, value in sorted(measured.distances.items(), key=lambda item: -item[1])
        ],
        f"{measured.num_new} new clips of {measured.num_new_files} files and the "
        f"{measured.num_reference} that the champion was trained on: Jensen-Shannon distance less "
        f"chance, from 0 to 1; {rule} (`retraining.min_drift`)",
    )


def data_funnel(
    clips: ClipSet, selection: ClipSelection, failures: Sequence[IngestedVideo]
) -> None:
    """Store how many files and clips went where, with every quarantined file and its reason.

    Args:
        clips: The committed clips.
        selection: The selection among them.
        failures: The quarantined files.
    """
    num_shots = clips.num_clips + clips.num_dropped_shots
    rows: list[dict[str, Any]] = [
        _funnel_row("files found", clips.num_videos, clips.num_videos),
        *(
            _funnel_row(f"quarantined: {reason}", count, clips.num_videos)
            for reason, count in sorted(clips.failures.items())
        ),
        _funnel_row("clips made", clips.num_clips, clips.num_clips),
        _funnel_row(
            "shots too short",
            clips.num_dropped_shots,
            num_shots,
            "between cuts, dissolves and fades; see `ingestion.min_clip_s`",
        ),
        *(
            _funnel_row(f"rejected: {reason}", count, clips.num_clips, explain(reason))
            for reason, count in sorted(selection.rejections.items())
        ),
        _funnel_row("clips kept", selection.num_kept, clips.num_clips),
        _funnel_row("kept for training", selection.num_train, clips.num_clips),
        _funnel_row("kept for validation", selection.num_validation, clips.num_clips),
    ]
    rows += [
        {
            "step": f"quarantined: {video.failure}",
            "count": 1,
            "percent": "",
            "file": video.source.uri,
            "detail": video.detail,
        }
        for video in failures
    ]
    table("data-funnel", rows, "From files to clips, and every file that could not be used.")


def _funnel_row(step: str, count: int, total: int, detail: str = "") -> dict[str, Any]:
    percent = f"{100 * count / total:.1f}" if total else ""
    plain = detail.replace("`", "")  # a table shows them
    return {"step": step, "count": count, "percent": percent, "file": "", "detail": plain}


def clip_examples(selected: Iterable[SelectedClip]) -> None:
    """Store some kept and some rejected clips with their scores.

    Args:
        selected: The verdict on every clip; the first `EXAMPLES` of each kind are shown.
    """
    kept: list[SelectedClip] = []
    rejected: list[SelectedClip] = []
    for item in selected:
        found = kept if item.kept else rejected
        if len(found) < EXAMPLES:
            found.append(item)
    lines = ["| verdict | caption | motion px/s | source | span |", "|---|---|---|---|---|"]
    for item in (*kept, *rejected):
        clip = item.clip
        verdict = f"kept ({item.split})" if item.kept else f"rejected: {item.reason}"
        motion = clip.scores.motion_px_per_s
        lines.append(
            f"| {markdown_text(verdict)} | {markdown_text(clip.caption or '')} | "
            f"{'' if motion is None else f'{motion:.1f}'} | {markdown_text(clip.source_uri)} | "
            f"{clip.start_s:.2f} s to {clip.end_s:.2f} s |"
        )
    markdown("clip-examples", "\n".join(lines), "Some clips with their verdicts.")


def token_shards(datasets: TokenDatasets) -> None:
    """Store the list of shards.

    Args:
        datasets: The data sets; the first 250 shards of each are listed.
    """
    rows = [
        {
            "data set": f"{dataset.modality} {dataset.split}",
            "latent size": "x".join(map(str, dataset.latent_shape)),
            "samples": shard.num_samples,
            "bytes": shard.num_bytes,
            "sha256": shard.sha256[:8],
            "shard": shard.uri,
        }
        for dataset in datasets.parts()
        for shard in dataset.shards[:250]
    ]
    lost = (
        f" Clips that could not be tokenized: {datasets.num_failed_clips}, of which "
        f"{datasets.num_unavailable_clips} are tried again by the next run; too short for a video, "
        f"so images alone: {datasets.num_short_clips}."
    )
    table("token-shards", rows, "Token shards in Parquet; the first 250 of each data set." + lost)


def dataset_version(version: DatasetVersion, changes: Sequence[FileChange]) -> None:
    """Store what a version of the data set has that the one before had not.

    Args:
        version: The version.
        changes: Its files that differ; the first `CHANGES` are listed.
    """
    rows: list[dict[str, Any]] = [
        {"change": change, "files": count, "file": "", "before": ""}
        for change, count in (*version.changes.items(), ("unchanged", version.num_unchanged))
    ]
    rows += [
        {
            "change": str(item.change),
            "files": 1,
            "file": item.source_uri,
            "before": item.previous_uri or (item.previous_content or "")[:16],
        }
        for item in changes[:CHANGES]
    ]
    place = markdown_code(version.manifest_uri)
    table("dataset-version", rows, f"Version {version.number}, {place}.")


def stage_summary(stage: str, metrics: Mapping[str, float], facts: Mapping[str, str]) -> None:
    """Store what came out of a training stage.

    Args:
        stage: Name of the stage.
        metrics: Those of its last step.
        facts: Further rows: name and Markdown.
    """
    lines = ["| | |", "|---|---|"]
    lines += [f"| {markdown_text(key)} | {value} |" for key, value in facts.items()]
    lines += [f"| `{key}` | {value:.5g} |" for key, value in sorted(metrics.items())]
    markdown(f"train-{slug(stage)}", "\n".join(lines), f"Stage {stage}.")


def eval_report(report: EvalReport, pictures_url: str, strip_url: str) -> None:
    """Store the metrics, the gate and a link to the samples.

    Args:
        report: The evaluation.
        pictures_url: Page with all samples and their prompts.
        strip_url: Address of the picture that shows them side by side.
    """
    measured: list[MetricInterval | Measure] = [
        *report.intervals,
        *report.measurements.measures,
    ]
    ends = {
        f"eval/{item.metric}": f"{item.low:.5g} to {item.high:.5g}"
        for item in measured
        if item.low is not None and item.high is not None
    }
    rows: list[dict[str, Any]] = [
        _metric_row("gate", "passed" if report.gate_passed else "refused"),
        *(_metric_row("refused because", reason) for reason in report.failed_gates),
    ]
    comparison = report.comparison
    if comparison is not None and comparison.problem is not None:
        name = f"champion version {comparison.champion_version}"
        rows.append(_metric_row(name, f"not compared: {comparison.problem}"))
    elif comparison is not None:
        text = f"{comparison.num_samples} samples"
        if comparison.unit is not None:
            text += f", {describe_units(comparison.unit, comparison.num_units)}"
        rows.append(_metric_row(f"champion version {comparison.champion_version}", text))
    rows += [
        _metric_row(
            f"{change.metric} less that of the champion",
            f"{change.difference:+.5g}",
            "" if change.low is None else f"{change.low:+.5g} to {change.high:+.5g}",
            "" if change.budget is None else f"{change.budget:g}",
        )
        for change in (comparison.changes if comparison else ())
    ]
    is_end = {f"{key}_{end}" for key in ends for end in ("low", "high")}
    rows += [
        _metric_row(key, f"{value:.5g}", ends.get(key, ""))
        for key, value in sorted(report.metrics.items(), key=lambda item: (_rank(item[0]), item[0]))
        if key not in is_end and not _IS_ONE_CELL.search(key)
    ]
    text = "What each metric is: docs/evaluation.md and docs/runbook.md. By time and frame: MLflow."
    table("eval-report", rows, text)
    link(
        "sample-grid", strip_url, "noise, sample, real", f"All samples with prompts: {pictures_url}"
    )


def _rank(key: str) -> int:
    return _HEADLINES.index(key) if key in _HEADLINES else len(_HEADLINES)


def _metric_row(metric: str, value: str, interval: str = "", budget: str = "") -> dict[str, Any]:
    return {"metric": metric, "value": value, "95 % interval": interval, "may be worse by": budget}


def model_version(version: ModelVersion, url: str) -> None:
    """Store a link to the registered version.

    Args:
        version: The version.
        url: Its page.
    """
    alias = f" ({version.alias})" if version.alias else ""
    text = f"{version.name} version {version.version}{alias}"
    link("model-version", url, text, f"Load it as {markdown_code(version.model_uri)}.")


def run_summary(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Store the summary of a run.

    Args:
        title: Headline, and description of the artifact.
        rows: Name, any text, and value in Markdown.
    """
    lines = [f"# {markdown_text(title)}", "", "| | |", "|---|---|"]
    lines += [f"| {markdown_text(key)} | {value} |" for key, value in rows]
    markdown("run-summary", "\n".join(lines), title)


def artifact_links(*keys: str) -> str:
    """Return links, in Markdown, to the newest artifacts of some keys.

    Args:
        *keys: Keys of artifacts.
    """
    # the page of a run is below /runs/ or /flow-runs/, as the version of Prefect has it
    base = re.split(r"/(?:flow-)?runs/", str(runtime.flow_run.ui_url or ""))[0]
    return ", ".join(f"[{key}]({base}/artifacts/key/{key})" for key in keys)


def slug(text: str) -> str:
    """Return a text in lower case with dashes, as artifact keys must be.

    Args:
        text: Such as the name of a stage.
    """
    return text.lower().replace("_", "-")
