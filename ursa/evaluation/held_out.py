"""Loss and accuracy on held-out tokens, beside what needs no model."""

import logging
from collections.abc import Sequence

import numpy as np

from ursa.artifacts import CheckpointRef, LossGrid, Measurements, TokenDatasets
from ursa.comparison import held_out_spans, measure
from ursa.config import RunConfig
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples, code_counts
from ursa.evaluation.measures import group_cases, mean_measure
from ursa.generation import UrsaPipeline
from ursa.model.transformer import build_transformer
from ursa.training.validation import (
    SETTING_PREFIX,
    copy_accuracy,
    gain_metrics,
    grid_metrics,
    settings_of,
)

logger = logging.getLogger(__name__)


def held_out_metrics(
    pipeline: UrsaPipeline, datasets: TokenDatasets, config: RunConfig
) -> tuple[dict[str, float], tuple[LossGrid, ...]]:
    """Return losses and accuracies by t of the model, an untrained one and the unigram.

    Args:
        pipeline: The model.
        datasets: Token data sets; without held-out samples the training ones alone are measured.
        config: The run; `evaluation` and the seed matter.

    Returns:
        Metrics and, of held-out samples, the grids behind them. `eval/loss_t*`,
        `eval/accuracy_t*`, `eval/untrained_loss_t*`, `eval/untrained_accuracy_t*`,
        `eval/train_loss_t*`, `eval/train_accuracy_t*`, the means over t `eval/loss`,
        `eval/accuracy` and so on, and `eval/unigram_loss`, `eval/unigram_accuracy`,
        `eval/chance_accuracy`; `eval/loss_frame*`; of clips of several latent frames the same as
        `eval/async_*` and `eval/i2v_*`, with their gains over one t for all frames, and
        `eval/copy_accuracy`. Losses in nats, accuracies in [0, 1].

    Raises:
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard is missing or damaged.
    """
    limit = config.evaluation.max_samples
    train = TokenSamples(datasets.video_train, max_samples=limit)
    untrained = build_transformer(
        pipeline.transformer.config,
        seed=address_seed(config.seed, "untrained"),
        codebook=pipeline.visual_tokenizer.codebook.cpu(),
    ).to(pipeline.device)

    logger.info(
        "losses of at most %d samples at %d times, in each setting",
        limit,
        len(config.evaluation.timesteps),
    )
    metrics = grid_metrics(measure(pipeline, train, config), "eval/train_")
    if not datasets.video_validation.num_samples:
        logger.warning("no held-out clips: the model is measured on training clips only")
        return metrics, ()
    held_out = TokenSamples(datasets.video_validation, max_samples=limit)
    grids = tuple(
        measure(pipeline, held_out, config, setting=setting) for setting in settings_of(held_out)
    )
    metrics |= grid_metrics(grids[0], "eval/", by_frame=True)
    metrics |= grid_metrics(
        measure(pipeline, held_out, config, network=untrained), "eval/untrained_"
    )
    metrics |= unigram_metrics(code_counts(datasets.video_train), held_out)
    for grid in grids[1:]:
        prefix = f"eval/{SETTING_PREFIX[grid.setting]}"
        metrics |= grid_metrics(grid, prefix) | gain_metrics(grid, grids[0], prefix)
        metrics["eval/copy_accuracy"] = copy_accuracy(
            held_out, batch_size=config.evaluation.batch_size
        )
    return metrics, grids


def held_out_measurements(
    grids: Sequence[LossGrid], datasets: TokenDatasets, config: RunConfig
) -> Measurements:
    """Return the means of grids with what two models are compared by, sample by sample.

    Args:
        grids: Of the held-out samples, as `held_out_metrics` returns them.
        datasets: The token data sets that were measured.
        config: The run; `evaluation` matters.

    Returns:
        `loss`, `accuracy`, `async_loss` and so on; of grids that are finite alone.

    Raises:
        ShardFormatError: If a shard is missing or damaged.
    """
    finite = [grid for grid in grids if grid.is_finite]
    if not finite:
        return Measurements()
    samples = TokenSamples(datasets.video_validation, max_samples=config.evaluation.max_samples)
    group = group_cases(
        "held_out_tokens",
        samples.sample_ids,
        (
            ("source", samples.source_ids),
            ("clip", samples.clip_ids),
            ("span", held_out_spans(samples, config.tokenization)),
        ),
    )
    measures = []
    for grid in finite:
        prefix = SETTING_PREFIX[grid.setting]
        measures += [
            mean_measure(f"{prefix}loss", grid.sample_loss, group),
            mean_measure(f"{prefix}accuracy", grid.sample_accuracy, group),
        ]
    return Measurements(measures=tuple(measures), cases=(group,))


def stage_metrics(checkpoint: CheckpointRef) -> dict[str, float]:
    """Return what the last stage changed, as it and the stage before were measured at their ends.

    Args:
        checkpoint: Result of the last stage.

    Returns:
        `eval/before_*` and `eval/after_*` of loss, accuracy, `i2v_*` and `async_*`, both of the
        same samples and noise, `eval/*_change` and its standard error `eval/*_change_se`; nothing
        if the stage began from weights of another run or after a stage on images.
    """
    metrics = {}
    for name, value in checkpoint.metrics.items():
        bare = name.removeprefix("val/")
        if bare.startswith("before_"):
            metrics[f"eval/{bare}"] = value
            after = bare.removeprefix("before_")
            metrics[f"eval/after_{after}"] = checkpoint.metrics[f"val/{after}"]
        elif bare.endswith(("_change", "_change_se")):
            metrics[f"eval/{bare}"] = value
    return metrics


def unigram_metrics(train_counts: np.ndarray, held_out: TokenSamples) -> dict[str, float]:
    """Return loss and accuracy of always predicting the training tokens' distribution.

    Measured on the same held-out samples as the model. Codes never seen in training get the
    weight of one occurrence (Laplace), so the loss is finite.

    Args:
        train_counts: How often each code occurs in training, shape (V,).
        held_out: Samples that are predicted.

    Returns:
        `eval/unigram_loss` in nats, `eval/unigram_accuracy` and `eval/chance_accuracy` = 1 / V in
        [0, 1].
    """
    counts = 1.0 + train_counts
    target = held_out.batch(range(len(held_out))).visual_ids.flatten().numpy()
    return {
        "eval/unigram_loss": float(-np.log(counts[target] / counts.sum()).mean()),
        "eval/unigram_accuracy": float((target == counts.argmax()).mean()),
        "eval/chance_accuracy": 1.0 / len(counts),
    }
