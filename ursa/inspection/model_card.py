"""The card of a model: use, data, training, measurements, limits and origin, from the records."""

from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

import pyarrow.compute as pc
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ursa.artifacts import CheckpointRef, EvalReport, StageRequest
from ursa.data.clips import read_selection_tables
from ursa.data.versions import DatasetVersion
from ursa.inspection.stats import count_values, total_s
from ursa.model.size import num_parameters
from ursa.texts import markdown_code, markdown_text
from ursa.training.stage import transformer_config

_MAX_LICENCES = 20
_TASK, _DATA = "text-to-video", "held-out clips of the source"


def model_card(
    report: EvalReport,
    request: StageRequest,
    stages: Sequence[CheckpointRef],
    version: DatasetVersion,
    *,
    name: str,
    origin: Mapping[str, str],
) -> str:
    """Return the card of a model as Markdown with a header that hubs of models read.

    Every number is one of the records; nothing is measured here.

    Args:
        report: The evaluation of the exported model.
        request: Its last stage.
        stages: The stages that made it, in their order.
        version: The version of the data set that it was trained on.
        name: What it is called, such as "ursa version 3".
        origin: Facts by name: commit, fingerprints, addresses of runs, the command.

    Returns:
        The card.

    Raises:
        ConfigError: If the text tokenizer is gone.
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    network = transformer_config(request)
    clips, verdicts = read_selection_tables(version.selection)
    kept = clips.filter(verdicts["kept"])
    licences = count_values(text or "unknown" for text in kept["license"].to_pylist())
    attributed = kept.num_rows - pc.sum(pc.is_null(kept["attribution"])).as_py()
    samples = request.config.tokenization
    metrics = report.metrics
    data = ModelCardData(
        library_name="ursa",
        pipeline_tag=_TASK,
        license="other",
        license_name="see-licences-of-the-training-clips",
        tags=["ursa", "discrete-diffusion", "video-generation"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type="ursa",
                dataset_name=_DATA,
                metric_type=key,
                metric_value=round(metrics[f"eval/{key}"], 4),
            )
            for key in ("loss", "accuracy")
            if f"eval/{key}" in metrics
        ],
    )
    source = markdown_code(unquote(version.source_uri))
    parts = [
        f"# {markdown_text(name)}",
        "A text- and image-to-video model trained by `ursa` with uniform discrete diffusion over "
        "video tokens on a metric path ([arXiv 2510.24717](https://arxiv.org/abs/2510.24717)).",
        "## Use",
        "```python\nfrom ursa import UrsaPipeline\n\n"
        f"pipe = UrsaPipeline.from_pretrained({report.model.directory_uri!a})\n"
        'frames = pipe("a caption like those it was trained on", output_type="np").frames[0]\n```',
        f"Clips of {samples.num_frames} frames, {samples.width_px} x {samples.height_px} pixels at "
        f"{samples.fps:g} frames per second.",
        "## Model",
        _table(
            ("part", "value"),
            [
                ("parameters", f"{num_parameters(network):,}"),
                ("layers, width", f"{network.num_hidden_layers}, {network.hidden_size}"),
                ("visual codes", f"{request.visual_tokenizer.vocab_size:,}"),
                ("text vocabulary", f"{request.text_tokenizer.vocab_size:,}"),
            ],
        ),
        "## Training data",
        f"Version {version.number} of the data set of {source}: "
        f"{version.num_files:,} files, {clips.num_rows:,} clips, of which {kept.num_rows:,} are "
        f"kept ({total_s(kept) / 60:,.1f} minutes), {version.selection.num_validation:,} of them "
        f"held out by source; {version.num_tokens:,} visual tokens. Names of authors are known of "
        f"{attributed:,} clips (column `attribution` of the clip table).",
        _table(("licence", "clips"), _first(licences)),
        "## Training",
        _table(
            ("stage", "steps", "samples seen", "loss at the end", "held-out loss"),
            [_stage_row(stage) for stage in stages],
        ),
        "## Measured on held-out clips",
        _evaluation(metrics, request),
        f"The gate {_verdict(report)}.",
        "## Limits",
        "It shows what its clips show; what is rare among them it does badly, and of few clips it "
        "repeats them. Nothing was done against misuse, captions were not checked for truth. "
        "Whether clips may be used for a purpose is said by their licences.",
        "## Where it is from",
        _table(("what", "value"), [(key, markdown_code(value)) for key, value in origin.items()]),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _first(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    first = list(counts.items())[:_MAX_LICENCES]
    rows = [(markdown_text(name), f"{count:,}") for name, count in first]
    left = sum(counts.values()) - sum(count for _, count in first)
    return [*rows, *([("others", f"{left:,}")] if left else [])]


def _stage_row(stage: CheckpointRef) -> tuple[str, ...]:
    return (
        stage.stage,
        f"{stage.step:,}",
        f"{stage.num_samples_seen:,}",
        *(_number(stage.metrics.get(key)) for key in ("train/loss", "val/loss")),
    )


def _evaluation(metrics: Mapping[str, float], request: StageRequest) -> str:
    rows = [
        (
            f"{t:g}",
            *(
                _number(metrics.get(f"eval/{key}_t{t:g}"))
                for key in ("untrained_loss", "loss", "train_loss", "accuracy")
            ),
        )
        for t in request.config.evaluation.timesteps
    ]
    head = ("t", "untrained network", "held-out loss", "loss on training clips", "accuracy")
    unigram = _number(metrics.get("eval/unigram_loss"))
    return (
        f"{_table(head, rows)}\n\nCross-entropy in nats; the unigram of the training tokens has "
        f"{unigram}. The visual tokenizer reconstructs held-out clips at "
        f"{_number(metrics.get('eval/tokenizer_psnr_validation'))} dB."
    )


def _verdict(report: EvalReport) -> str:
    reasons = markdown_text("; ".join(report.failed_gates))
    return "holds" if report.gate_passed else f"fails: {reasons}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
