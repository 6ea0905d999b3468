"""The evaluation step: what a model does on clips it never saw, and samples to look at.

Sound without any pretrained weights: cross-entropy and accuracy by t against the untrained network
and the unigram distribution, reconstruction of the tokenizer, and what `ursa.evaluation.drawn`
measures of drawn clips.
"""

import logging

import torch

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    ClipSelection,
    EvalReport,
    ExportedModel,
    TokenDatasets,
)
from ursa.comparison import Champion, ScoresPlace, compare_with
from ursa.config import RunConfig, fingerprint
from ursa.data.clips import read_selection
from ursa.evaluation.drawn import measure_drawn
from ursa.evaluation.held_out import held_out_metrics, stage_metrics
from ursa.evaluation.measures import join, measurement_metrics
from ursa.evaluation.samples import draw_samples, write_samples
from ursa.evaluation.tokenizer import measure_code_usage, measure_tokenizer
from ursa.gate import comparison_metrics, comparison_text, failed_gates, metric_intervals
from ursa.generation import UrsaPipeline
from ursa.training.trainer import OnMetrics
from ursa.video.reader import ClipReader

logger = logging.getLogger(__name__)

EVALUATION_VERSION = 2
"""Counts up when the same model is measured or judged otherwise: it is then measured again."""


def evaluate(
    model: ExportedModel,
    datasets: TokenDatasets,
    selection: ClipSelection,
    config: RunConfig,
    *,
    output_uri: str,
    champion: Champion | None,
    device: torch.device | str = "cpu",
    on_metrics: OnMetrics | None = None,
) -> EvalReport:
    """Measure a model on held-out tokens, sample it and decide whether it passes the gate.

    Args:
        model: The exported model.
        datasets: Token data sets; the validation ones are measured.
        selection: Clips, for real frames beside the samples.
        config: The run; `evaluation` and `release` matter.
        output_uri: Root of all data of the run.
        champion: The present champion, measured on the same samples and noise; None without one.
        device: Where the networks run; noise is drawn on the CPU, so no device has other tokens to
            predict, and losses differ by rounding.
        on_metrics: Called once with (steps trained, metrics).

    Returns:
        The committed report with its samples: mp4 and gif of every prompt, and `strip.png`.

    Raises:
        ConfigError: If the model directory is damaged.
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard or a table of the clips is missing or damaged.
        VideoDecodeError: If a clip cannot be read.
        StorageError: If the store refuses or does not answer.
    """
    print_ = fingerprint(
        "evaluation",
        EVALUATION_VERSION,
        SCHEMA_VERSION,
        model.fingerprint,
        datasets.fingerprint,
        config.evaluation,
        config.release,
        # the same model may be another version of another registry
        None if champion is None else (champion.model_key, champion.version),
        config.seed,
    )
    folder_uri = storage.join(output_uri, "evaluations", print_[:32])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(manifest_uri, EvalReport)
    if done is not None:
        return done
    with storage.local_directory(model.directory_uri) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    metrics, grids = held_out_metrics(pipeline, datasets, config)
    metrics |= stage_metrics(model.checkpoint)
    place = ScoresPlace(model, datasets, config, output_uri)
    scores = place.commit(model.content_key, grids)
    intervals = metric_intervals(scores) if scores else ()
    comparison = None
    if champion is not None:
        comparison = compare_with(champion, pipeline, scores, place)
        logger.info("%s", comparison_text(comparison))
    metrics |= comparison_metrics(intervals, comparison)
    selected = read_selection(selection)
    with ClipReader() as reader:
        samples = draw_samples(pipeline, selected, config, reader.read)
        measurements = join(
            measure_tokenizer(pipeline, selected, config, reader.read),
            measure_code_usage(datasets.video_train),
            measure_drawn(pipeline, selected, config, reader.read),
        )
    metrics |= measurement_metrics(measurements)
    samples_uri = storage.unique_place(folder_uri, "samples")
    files = write_samples(samples, samples_uri, fps=config.tokenization.fps)
    failed = failed_gates(metrics, comparison, config)
    if on_metrics is not None:
        on_metrics(model.checkpoint.step, metrics)
    return storage.commit_record(
        manifest_uri,
        EvalReport(
            manifest_uri=manifest_uri,
            model=model,
            metrics=metrics,
            grids=tuple(grid for grid in grids if grid.is_finite),
            samples_uri=samples_uri,
            samples=files,
            intervals=intervals,
            comparison=comparison,
            measurements=measurements,
            gate_passed=not failed,
            failed_gates=failed,
            fingerprint=print_,
        ),
    )
