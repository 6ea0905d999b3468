"""The report of a run: one HTML file, from the funnel of its data to what its training has cost."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from ursa import storage
from ursa.artifacts import EvalReport, StageRequest
from ursa.data.addresses import address_seed
from ursa.data.clips import iter_selection, read_selection, read_selection_tables
from ursa.data.versions import DatasetVersion, read_version_files
from ursa.generation import UrsaPipeline
from ursa.inspection.gallery import sample_figures
from ursa.inspection.page import document, escape, funnel_table, section, table
from ursa.inspection.pictures import data_url, jpeg
from ursa.inspection.run_pictures import (
    Curve,
    draw_with_codes,
    flip_strip,
    loss_curves,
    memory_curves,
    reconstructions,
)
from ursa.inspection.stats import count_values, funnel
from ursa.training import schedule, validation
from ursa.video.reader import ClipReader

CURVES = (
    "train/loss",
    "val/loss",
    "train/samples_seen",
    "train/step_s",
    "train/tokens_per_s",
    "train/peak_memory_bytes",
)
"""Metrics of a training stage that a report shows."""
MAX_GALLERY_BYTES = 3 << 20
"""Of the clips; base64 makes it a third more."""
NUM_RECONSTRUCTIONS = 3
"""For each split."""
NUM_FLIP_STRIPS = 2
_MAX_FILES = 100


class StageRun(NamedTuple):
    """What the tracking server knows of a step of the run.

    Attributes:
        name: Of the step, as it is tracked.
        seconds: How long it was under way; None while it is.
        curves: Values by metric name; empty if the step was found done.
    """

    name: str
    seconds: float | None
    curves: Mapping[str, Curve]


class RunReport(NamedTuple):
    """What a report is made of.

    Attributes:
        title: Headline, such as "ursa version 3".
        links: Pages by name, such as that of the run.
        facts: Where it is from: name and value.
        report: The evaluation of the exported model.
        request: The last stage.
        version: The version of the data set; None if it is not known.
        steps: All steps of the run.
    """

    title: str
    links: Mapping[str, str]
    facts: Mapping[str, str]
    report: EvalReport
    request: StageRequest
    version: DatasetVersion | None
    steps: Sequence[StageRun]


def run_report(given: RunReport) -> str:
    """Return the report of a run.

    Two clips are drawn for it, and some windows of clips are put through the visual tokenizer; all
    else is read. It holds some megabytes at most.

    Args:
        given: What it is made of.

    Returns:
        A whole HTML document.

    Raises:
        ConfigError: If the model directory is damaged.
        FileNotFoundError: If a sample is gone.
        ShardFormatError: If a table of the data set is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    stages = {step.name: step.curves for step in given.steps}
    with storage.local_directory(given.report.model.directory_uri) as folder:
        pipeline = UrsaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    parts = [
        _head(given),
        section("From files to clips", _funnel(given.version)),
        section("Schedule of the path", _schedule(given.request)),
        section("Loss", _picture(loss_curves(stages), "training and held-out loss by step")),
        section("Held-out loss by time and latent frame", _grids(given.report)),
        section("Samples", _gallery(given.report)),
        section("How tokens settle", _flips(pipeline, given)),
        section("What the visual tokenizer keeps", _reconstructions(pipeline, given)),
        section("Measured on held-out clips", _measured(given.report)),
        section("Where it is from", _lineage(given)),
        section("What it has cost", _cost(given.steps)),
    ]
    return document(given.title, parts)


def _head(given: RunReport) -> str:
    report = given.report
    kind, word = ("", "the gate holds") if report.gate_passed else (" lost", "refused")
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.failed_gates)
    metrics = {
        "held-out loss": ("eval/loss", "{:.3f}"),
        "held-out accuracy": ("eval/accuracy", "{:.1%}"),
        "tokenizer, dB": ("eval/tokenizer_psnr_validation", "{:.1f}"),
    }
    facts = [
        (name, form.format(report.metrics[key]))
        for name, (key, form) in metrics.items()
        if key in report.metrics
    ]
    seconds = sum(step.seconds or 0.0 for step in given.steps)
    facts.append(("minutes", f"{seconds / 60:,.1f}"))
    if given.version is not None:
        facts.insert(0, ("clips kept", f"{given.version.selection.num_kept:,}"))
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in facts)
    links = " · ".join(
        f'<a href="{escape(url)}" target="_blank" rel="noreferrer">{escape(name)}</a>'
        for name, url in given.links.items()
    )
    note = "<br>MLflow shows this page in a frame that opens no links; a downloaded copy does."
    return (
        f'<h1>{escape(given.title)} <span class="tag{kind}">{word}</span></h1>'
        f'<div class="small">{links}{note}</div>{f"<ul>{reasons}</ul>" if reasons else ""}'
        f'<div class="facts">{cells}</div>'
    )


def _funnel(version: DatasetVersion | None) -> str:
    if version is None:
        return "<p>The version of the data set is not known.</p>"
    chosen = version.selection
    return funnel_table(
        funnel(version.clips, chosen.rejections, chosen.num_train, chosen.num_validation)
    )


def _schedule(request: StageRequest) -> str:
    committed = schedule.fit_path(
        request.config.path,
        request.visual_tokenizer,
        request.datasets,
        output_uri=request.output_uri,
    )
    if committed is None:
        path = request.config.path
        return f"<p>Fixed: alpha {path.alpha:g}, c {path.c:g}.</p>"
    fitted = committed.fitted
    words = (
        f"Fitted to {fitted.num_rows:,} codes: alpha {fitted.alpha:.3g}, c {fitted.c:.3g}, off the "
        f"straight line by {fitted.power_deviation:.1%}; a table is off by "
        f"{fitted.table_deviation:.2g}. The path takes the {fitted.kind}."
    )
    picture = storage.read_bytes(storage.join(committed.folder_uri, schedule.PICTURE))
    return f'{_picture(picture, "mean distance by t, and beta")}<p class="small">{words}</p>'


def _picture(png: bytes | None, text: str) -> str:
    if png is None:
        return "<p>None: the steps were found done.</p>"
    return f'<img class="wide" alt="{text}" src="{data_url(png, "png")}">'


def _grids(report: EvalReport) -> str:
    if not report.grids:
        return "<p>Nothing is held out.</p>"
    words = (
        "Rows: t, 0 is noise; columns: latent frames. In “per frame” the other frames are at times "
        "of their own, in “image to video” the first one is given."
    )
    picture = _picture(validation.picture(report.grids), "heat maps of the loss")
    return f'{picture}<p class="small">{words}</p>'


def _gallery(report: EvalReport) -> str:
    figures = sample_figures(report.samples_uri, max_bytes=MAX_GALLERY_BYTES)
    return f'<div class="grid">{"".join(figures)}</div>' if figures else "<p>No samples.</p>"


def _flips(pipeline: UrsaPipeline, given: RunReport) -> str:
    selected = () if given.version is None else iter_selection(given.version.selection)
    captions = [item.clip.caption or "" for item in selected if item.split == "train"]
    figures = []
    for prompt in list(dict.fromkeys(captions or [""]))[:NUM_FLIP_STRIPS]:
        seed = address_seed(given.request.config.seed, "report", prompt)
        flips = draw_with_codes(pipeline, prompt, seed)
        picture = data_url(flip_strip(pipeline.visual_tokenizer, flips), "png")
        figures.append(
            f'<figure><img alt="frames and flipped tokens by step" src="{picture}">'
            f"<figcaption>{escape(prompt) or '<i>no prompt</i>'}</figcaption></figure>"
        )
    words = (
        "Above: the middle frame after some steps of the sampler. Below: how often each token of "
        "its latent frame has changed since the column before, black is never."
    )
    return f'{"<br>".join(figures)}<p class="small">{words}</p>'


def _reconstructions(pipeline: UrsaPipeline, given: RunReport) -> str:
    if given.version is None:
        return "<p>The version of the data set is not known.</p>"
    with ClipReader() as reader:
        found = reconstructions(
            pipeline.visual_tokenizer,
            read_selection(given.version.selection),
            given.request.config,
            reader.read,
            each=NUM_RECONSTRUCTIONS,
        )
    figures = [
        f'<figure><img alt="original above, reconstruction below" '
        f'src="{data_url(jpeg(item.picture), "jpeg")}"><figcaption>'
        f'<span class="tag">{item.split}</span> {item.psnr_db:.1f} dB '
        f'<span class="small">{escape(_name(item.name))}</span></figcaption></figure>'
        for item in found
    ]
    if not figures:
        return "<p>No clip could be read.</p>"
    words = "Original above, reconstruction below: no sample can be sharper than that."
    return f'<div class="grid">{"".join(figures)}</div><p class="small">{words}</p>'


def _measured(report: EvalReport) -> str:
    rows = [
        (escape(item.metric), f"{item.value:.4g}", f"{item.low:.4g} to {item.high:.4g}", "")
        for item in report.intervals
    ]
    if not rows:
        rows = [
            (key, f"{report.metrics[f'eval/{key}']:.4g}", "", "")
            for key in ("loss", "accuracy")
            if f"eval/{key}" in report.metrics
        ]
    comparison = report.comparison
    if comparison is not None:
        champion = f"less that of version {escape(comparison.champion_version)}"
        rows += [
            (
                f"{escape(change.metric)} {champion}",
                f"{change.difference:+.4g}",
                "" if change.low is None else f"{change.low:+.4g} to {change.high:+.4g}",
                "" if change.budget is None else f"{change.budget:g}",
            )
            for change in comparison.changes
        ]
    head = ("metric", "value", "95 % interval", "may be worse by")
    problem = comparison.problem if comparison is not None else None
    note = f'<p class="small">Not compared with the champion: {escape(problem)}</p>'
    return table(head, rows) + (note if problem else "")


def _lineage(given: RunReport) -> str:
    request, version = given.request, given.version
    facts = {
        **given.facts,
        "model directory": given.report.model.directory_uri,
        "evaluation": given.report.manifest_uri,
        "tokens": request.datasets.manifest_uri,
        "visual tokenizer": request.visual_tokenizer.manifest_uri,
        "text tokenizer": request.text_tokenizer.manifest_uri,
    }
    if version is not None:
        facts |= {
            "data set version": f"{version.number}: {version.manifest_uri}",
            "selection": version.selection.manifest_uri,
            "clips": version.clips.manifest_uri,
            "source": unquote(version.source_uri),
        }
    rows = [
        (escape(key), f'<span class="small">{escape(value)}</span>') for key, value in facts.items()
    ]
    found = table((), rows, kind="lineage")
    if version is None:
        return found
    clips, verdicts = read_selection_tables(version.selection)
    licences = count_values(
        text or "unknown" for text in clips.filter(verdicts["kept"])["license"].to_pylist()
    )
    licence_rows = [(escape(name), f"{count:,}") for name, count in licences.items()]
    files = read_version_files(version)
    file_rows = [
        (
            escape(_name(item["source_uri"])),
            f"{item['num_clips']:,}",
            escape(item["status"]),
            escape(str(item["content"])[:16]),
        )
        for item in files[:_MAX_FILES]
    ]
    left = f"<p>and {len(files) - _MAX_FILES:,} more</p>" if len(files) > _MAX_FILES else ""
    return (
        f"{found}<h3>Licences</h3>{table(('licence', 'clips kept'), licence_rows)}"
        f"<h3>Files</h3>{table(('file', 'clips', 'state', 'sha256'), file_rows)}{left}"
    )


def _cost(steps: Sequence[StageRun]) -> str:
    rows = []
    for step in steps:
        curves = step.curves
        count = _last(curves, "train/samples_seen")
        peak = max((value for _, value in curves.get("train/peak_memory_bytes", ())), default=None)
        tokens = [
            speed[1] * time[1]
            for speed, time in zip(
                curves.get("train/tokens_per_s", ()), curves.get("train/step_s", ()), strict=False
            )
        ]
        num_steps = max((number for number, _ in curves.get("train/loss", ())), default=None)
        total = num_steps * sum(tokens) / len(tokens) if tokens and num_steps else None
        rows.append(
            (
                escape(step.name),
                _shown(step.seconds, "{:,.1f}"),
                _shown(num_steps, "{:,}"),
                _shown(count, "{:,.0f}"),
                _shown(total, "{:,.0f}"),
                _shown(_mean(curves, "train/step_s"), "{:.3f}"),
                _shown(None if peak is None else peak / 2**20, "{:,.0f}"),
            )
        )
    head = ("step", "seconds", "steps", "samples", "visual tokens", "s a step", "memory, MiB")
    picture = memory_curves({step.name: step.curves for step in steps})
    memory = "" if picture is None else _picture(picture, "memory by step")
    return f"{table(head, rows)}<br>{memory}"


def _last(curves: Mapping[str, Curve], key: str) -> float | None:
    return curves[key][-1][1] if curves.get(key) else None


def _mean(curves: Mapping[str, Curve], key: str) -> float | None:
    values = [value for _, value in curves.get(key, ())]
    return sum(values) / len(values) if values else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _name(uri: str) -> str:
    return unquote(uri.rpartition("/")[2])
