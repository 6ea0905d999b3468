"""How far new clips are from those that a model was trained on, by what is measured of each clip.

One number a score: the Jensen-Shannon distance (base 2, in [0, 1]) of two histograms, the measure
of Evidently (`jensenshannon`, https://docs.evidentlyai.com/metrics/customize_data_drift) and
NannyML (https://nannyml.readthedocs.io/en/stable/how_it_works/univariate_drift_detection.html),
where drift begins at 0.1. The bins are the deciles of all clips together.

Few samples differ by chance alone, and clips of one file resemble each other. So what
`NUM_DIVISIONS` random divisions of all files into two such groups give at most is taken off the
divergence, which is the square of the distance. What is left is more than chance, whether ten files
are new or a thousand; of a handful of files nothing can be said, and nothing is left.
"""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ursa.artifacts import ClipSelection
from ursa.config import FrozenModel
from ursa.data.clips import read_selection_tables
from ursa.errors import DataError
from ursa.video.score_table import SCORES

CAPTION_WORDS = "caption_words"
NUM_WORDS = 100
"""The most frequent words have a bin each, all others have one together."""
NUM_DIVISIONS = 100
_DECILES = np.arange(1, 10) / 10

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Drift(FrozenModel):
    """How far new clips are from those of a reference.

    Attributes:
        num_reference: Clips that the model was trained on.
        num_new: Kept clips that it does not know.
        num_new_files: The files that they are from.
        distances: Jensen-Shannon distance less chance, in [0, 1], by score, `<scorer>/<score>` or
            `CAPTION_WORDS`; empty without new clips.
    """

    num_reference: int
    num_new: int
    num_new_files: int
    distances: dict[str, float]

    @property
    def greatest(self) -> tuple[str, float]:
        """Name and distance of what differs most; ("", 0) without new clips."""
        return max(self.distances.items(), key=lambda item: item[1], default=("", 0.0))


def measure_drift(reference: ClipSelection, selection: ClipSelection) -> Drift:
    """Compare the kept clips that a selection has and another has not with those to train on there.

    Args:
        reference: The selection that a model was trained on.
        selection: The selection with the new clips.

    Returns:
        The distances.

    Raises:
        DataError: If the reference has no clip to train on.
        ShardFormatError: If a table is damaged.
        StorageError: If the store refuses or does not answer.
    """
    clips, verdicts = read_selection_tables(reference)
    known = set(clips.filter(verdicts["kept"])["clip_id"].to_pylist())
    trained = clips.filter(pa.array([split == "train" for split in verdicts["split"].to_pylist()]))
    if not trained.num_rows:
        raise DataError(f"{reference.manifest_uri} has no clip to train on")
    clips, verdicts = read_selection_tables(selection)
    kept = clips.filter(verdicts["kept"])
    new = kept.filter(pa.array([clip_id not in known for clip_id in kept["clip_id"].to_pylist()]))
    return Drift(
        num_reference=trained.num_rows,
        num_new=new.num_rows,
        num_new_files=len(set(new["source_sha256"].to_pylist())),
        distances=distances(trained, new) if new.num_rows else {},
    )


def distances(reference: pa.Table, new: pa.Table) -> dict[str, float]:
    """Return the distance of each score that some clips of both have, and of the captions' words.

    Args:
        reference: A table of `CLIP_SCHEMA` with at least one row.
        new: Likewise.
    """
    known, others = (np.array(table["source_sha256"].to_pylist()) for table in (reference, new))
    known, others = (np.unique(names, return_inverse=True)[1] for names in (known, others))
    num_known, num_new = known.max() + 1, others.max() + 1
    files = np.concatenate([known, num_known + others])
    rng = np.random.default_rng(0)
    divisions = [rng.permutation(num_known + num_new)[:num_new] for _ in range(NUM_DIVISIONS)]
    own = np.arange(num_known, num_known + num_new)
    found = {}
    for name, counts in _histograms(reference, new, files):
        chance = max(divergence(counts, chosen) for chosen in divisions)
        found[name] = float(np.sqrt(max(0.0, divergence(counts, own) - chance)))
    return found


def divergence(counts: Counts, chosen: npt.NDArray[np.int64]) -> float:
    """Return the Jensen-Shannon divergence of some files from the others.

    Args:
        counts: Histograms of all files, (F, B).
        chosen: Indices of some of them.

    Returns:
        Bits, in [0, 1]: 0 for the same shares of all bins, 1 where no bin is common; 0 where one
        side has nothing.
    """
    these = counts[chosen].sum(0)
    rest = counts.sum(0) - these
    if not these.sum() or not rest.sum():
        return 0.0
    p, q = these / these.sum(), rest / rest.sum()
    return float(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(shares: Values) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())


def _histograms(
    reference: pa.Table, new: pa.Table, files: npt.NDArray[np.int64]
) -> Iterator[tuple[str, Counts]]:
    """Yield names and histograms of all files, (F, B); `files` has the file of each clip."""
    before, after = _scores(reference), _scores(new)
    for name in sorted(before.keys() & after.keys()):
        if np.isfinite(before[name]).any() and np.isfinite(after[name]).any():
            yield name, _count(files, _bins(np.concatenate([before[name], after[name]])))
    captions = [*reference["caption"].to_pylist(), *new["caption"].to_pylist()]
    # a word counts once a file
    said = {
        (file, word)
        for file, text in zip(files.tolist(), captions, strict=True)
        for word in re.findall(r"\w+", (text or "").lower())
    }
    if said:
        often = Counter(word for _, word in sorted(said)).most_common(NUM_WORDS)
        bins = {word: place for place, (word, _) in enumerate(often)}
        pairs = np.array([(file, bins.get(word, NUM_WORDS)) for file, word in sorted(said)])
        yield CAPTION_WORDS, _count(pairs[:, 0], pairs[:, 1], num_files=int(files.max()) + 1)


def _scores(clips: pa.Table) -> dict[str, Values]:
    """Return the values of each score, NaN where there is none."""
    found = {
        name: clips[name].cast(pa.float64()).to_numpy()
        for name in SCORES
        if name in clips.column_names
    }
    for row, pairs in enumerate(clips["extra_scores"].to_pylist()):
        for pair in pairs:
            values = found.setdefault(pair["name"], np.full(clips.num_rows, np.nan))
            values[row] = pair["value"]
    return found


def _bins(values: Values) -> Counts:
    """Return between which of their deciles values are; the last bin is for missing ones."""
    is_there = np.isfinite(values)
    # exchangeable with those of every random division, as those of the reference alone are not
    deciles = np.quantile(values[is_there], _DECILES, method="inverted_cdf")
    # a value that is many, such as 0, has a bin of its own
    many = deciles[1:][np.diff(deciles) == 0]
    edges = np.unique(np.concatenate([deciles, np.nextafter(many, np.inf)]))
    return np.where(is_there, np.searchsorted(edges, values, side="right"), len(edges) + 1)


def _count(files: Counts, bins: Counts, num_files: int | None = None) -> Counts:
    """Return the histogram of each file, (F, B)."""
    counts = np.zeros((num_files or int(files.max()) + 1, int(bins.max()) + 1), np.int64)
    np.add.at(counts, (files, bins), 1)
    return counts
