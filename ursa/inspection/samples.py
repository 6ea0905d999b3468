"""How many samples the selected clips of a data root give, before they are tokenized."""

from collections import Counter

import pyarrow.compute as pc

from ursa.config import RunConfig
from ursa.data.buckets import bucket_settings, choose_bucket
from ursa.data.clips import read_selection_tables, unchecked_clips
from ursa.data.units import MODALITIES, SPLITS, clip_samples, num_variants
from ursa.inspection.root import load_selection
from ursa.training.plan import DataSize


def count_samples(
    root_uri: str, config: RunConfig, *, selection_uri: str | None = None
) -> DataSize:
    """Count the samples of the newest selection; clips that will fail are counted too.

    Args:
        root_uri: The data root.
        config: The run; `tokenization` matters.
        selection_uri: Manifest or folder of a selection; None takes the newest.

    Returns:
        Clips, and samples by split and modality.

    Raises:
        DataError: If there is no selection.
        ManifestError: If its manifest is damaged.
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    settings = config.tokenization
    stride_t = config.visual_tokenizer.temporal_stride
    stride_s = config.visual_tokenizer.spatial_stride
    table, verdicts = read_selection_tables(load_selection(root_uri, selection_uri))
    counts: dict[str, Counter[str]] = {}
    num_clips = num_tokens = 0
    for split in SPLITS:
        chosen = pc.and_kleene(verdicts["kept"], pc.equal(verdicts["split"], split))
        clips = unchecked_clips(table.filter(chosen))
        num_clips += len(clips)
        counts[split] = Counter(dict.fromkeys(MODALITIES, 0))
        for clip in clips:
            own = bucket_settings(settings, choose_bucket(clip, settings))
            per_frame = (own.height_px // stride_s) * (own.width_px // stride_s)
            for modality, samples in clip_samples(clip, own).items():
                count = len(samples) * (1 + num_variants(modality, split, own))
                frames = 1 if modality == "image" else 1 + (own.num_frames - 1) // stride_t
                counts[split][modality] += count
                num_tokens += count * frames * per_frame
    return DataSize(
        num_clips=num_clips,
        num_train=dict(counts["train"]),
        num_validation=dict(counts["validation"]),
        num_tokens=num_tokens,
    )
