"""How many samples the selected clips of a data root give, before they are tokenized."""

from collections import Counter

import pyarrow.compute as pc

from ursa.config import RunConfig
from ursa.data.clips import read_selection_tables, unchecked_clips
from ursa.data.units import MODALITIES, clip_samples, num_variants
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
    table, verdicts = read_selection_tables(load_selection(root_uri, selection_uri))
    counts: dict[str, Counter[str]] = {}
    num_clips = 0
    for split in ("train", "validation"):
        chosen = pc.and_kleene(verdicts["kept"], pc.equal(verdicts["split"], split))
        clips = unchecked_clips(table.filter(chosen))
        num_clips += len(clips)
        counts[split] = Counter(dict.fromkeys(MODALITIES, 0))
        for clip in clips:
            for modality, samples in clip_samples(clip, config.tokenization).items():
                variants = num_variants(modality, split, config.tokenization)
                counts[split][modality] += len(samples) * (1 + variants)
    return DataSize(
        num_clips=num_clips,
        num_train=dict(counts["train"]),
        num_validation=dict(counts["validation"]),
    )
