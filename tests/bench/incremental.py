"""What a second run costs when files were added: `python tests/bench/incremental.py [old] [new]`.

The same new files are added to `old` and to ten times as many files that were ingested, tokenized
and committed before; the second run is timed from the listing to the data set version.
"""

import sys
import tempfile
import time
from pathlib import Path

from tests import data_roots, factories, media
from ursa.artifacts import TokenizerRef
from ursa.data.versions import Change, DatasetVersion, commit_version

CONFIG = data_roots.root_config(tokenization={"clips_per_shard": 4})


def save(folder: Path, first: int, count: int) -> None:
    """Write short videos, each of its own content."""
    for seed in range(first, first + count):
        frames = media.panning(36, step=2, height=96, width=128, seed=seed)
        media.save_video(folder / f"v{seed:05d}.mp4", frames, 24.0)


def run(source: Path, uri: str, tokenizer: TokenizerRef) -> tuple[float, DatasetVersion]:
    """Prepare the data of a source; return the seconds that it took, and the version."""
    began = time.perf_counter()
    root = data_roots.prepare(source, uri, CONFIG, tokenizer)
    version = commit_version(
        uri, CONFIG, root.selection, (tokenizer, tokenizer), root.datasets, code={}
    )
    return time.perf_counter() - began, version


def second_run_s(num_old: int, num_new: int) -> tuple[float, float]:
    """Return the seconds of the first run, and of the second after files were added."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "videos"
        source.mkdir()
        tokenizer = factories.write_visual_tokenizer(str(folder / "tokenizer"))
        save(source, 0, num_old)
        first_s, _ = run(source, f"{folder}/data", tokenizer)
        save(source, 90_000, num_new)
        second_s, version = run(source, f"{folder}/data", tokenizer)
        assert version.changes == {**dict.fromkeys(Change, 0), Change.ADDED: num_new}
        return first_s, second_s


def main(num_old: int, num_new: int) -> None:
    """Measure and print."""
    second_run_s(2, 1)  # imports and caches
    few_first, few = second_run_s(num_old, num_new)
    many_first, many = second_run_s(10 * num_old, num_new)
    print(f"{num_new} files added to {num_old:4d}: {few:6.2f} s (first run {few_first:.1f} s)")
    print(
        f"{num_new} files added to {10 * num_old:4d}: {many:6.2f} s (first run {many_first:.1f} s)"
    )
    print(f"ten times the old data: {many / few:.2f} times as long")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3] or ("12", "12")))
