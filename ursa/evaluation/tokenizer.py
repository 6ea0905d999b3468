"""How well the visual tokenizer keeps a picture, and how many of its codes are in use."""

import logging
from collections.abc import Sequence

import numpy as np

from ursa.artifacts import Measurements, SelectedClip, Split, TokenDataset
from ursa.config import RunConfig
from ursa.data.dataset import code_counts
from ursa.data.units import SPLITS
from ursa.evaluation.clips import psnr, ssim
from ursa.evaluation.measures import join, mean_measure, plain_measure
from ursa.evaluation.windows import group_windows, iter_windows
from ursa.generation import UrsaPipeline
from ursa.video.decode import ReadFrames, read_frames_at

logger = logging.getLogger(__name__)

_WINDOWS = 32


def measure_tokenizer(
    pipeline: UrsaPipeline,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames = read_frames_at,
) -> Measurements:
    """Measure the reconstruction of real windows by split.

    Args:
        pipeline: Holds the tokenizer.
        selected: Clips; at most 32 windows of each split, evenly spread, are measured.
        config: The run; `tokenization` matters.
        read: Reads frames of a local file.

    Returns:
        `tokenizer_psnr_<split>`, `tokenizer_ssim_<split>`; a split without windows that can be read
        is absent.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return join(*(_measure_split(pipeline, selected, config, read, split) for split in SPLITS))


def _measure_split(
    pipeline: UrsaPipeline,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames,
    split: Split,
) -> Measurements:
    windows = list(iter_windows(selected, split, config, read, limit=_WINDOWS))
    if not windows:
        return Measurements()
    group = group_windows(f"windows_{split}", windows, config.tokenization)
    logger.info("reconstruction of %d %s windows", len(windows), split)
    real = np.stack([window.frames for window in windows])
    size = config.evaluation.batch_size
    tokenizer = pipeline.visual_tokenizer
    decoded = tokenizer.decode(tokenizer.encode(real, batch_size=size), batch_size=size)
    pairs = list(zip(real, decoded, strict=True))
    return Measurements(
        measures=(
            mean_measure(f"tokenizer_psnr_{split}", [psnr(*pair) for pair in pairs], group),
            mean_measure(f"tokenizer_ssim_{split}", [ssim(*pair) for pair in pairs], group),
        ),
        cases=(group,),
    )


def measure_code_usage(train: TokenDataset) -> Measurements:
    """Count the codes of the training samples.

    Args:
        train: Training samples; all are counted, so there is no interval.

    Returns:
        `train_code_usage`, the share of codes that occur, and `train_code_perplexity`, the
        exponential of the entropy of their distribution: so many evenly used codes hold as much.

    Raises:
        ShardFormatError: If a shard is missing or damaged.
    """
    counts = code_counts(train)
    return Measurements(
        measures=(
            plain_measure("train_code_usage", float((counts > 0).mean())),
            plain_measure("train_code_perplexity", perplexity(counts)),
        )
    )


def perplexity(counts: np.ndarray) -> float:
    """Return the exponential of the entropy of a distribution of codes.

    Args:
        counts: How often each code occurs, shape (V,), at least one of them.

    Returns:
        In [1, V].
    """
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
