"""Reading data: token shards for training, against plain pyarrow.

    python tests/bench/data.py             # some minutes; `make bench` runs it
    python tests/bench/data.py throughput  # one table alone

Every run has a process of its own: seconds of wall time, and the peak of memory over what the
process holds once everything is imported. Ids are drawn so that they compress about as those of
videos do: most of a frame is as in the frame before. Files are in the page cache.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests import factories
from ursa import storage
from ursa.artifacts import TokenDataset
from ursa.data.loader import TokenLoader
from ursa.data.order import BLOCK_BYTES
from ursa.data.shards import READ_THREADS, write_shard

CODES = 64_000
SHAPES = {2560: (5, 16, 32), 33_280: (13, 40, 64)}
"""Latent shape by number of ids."""
BATCH = 64
SMALL_BLOCK_BYTES = 32 << 20
"""A block of an eighth of the size, so that data sets of an eighth of the size are many blocks."""
STEP_S = 0.02
"""What a step of the accelerator takes, in which the processor is free."""
LATENCY_S = 0.05


def write_data(folder: Path, num_ids: int, num_samples: int, per_shard: int) -> TokenDataset:
    """Write a data set of different samples."""
    random = np.random.default_rng(0)
    shape = SHAPES[num_ids]
    shares = 1 / np.arange(1, CODES + 1) ** 0.8
    drawn = random.choice(CODES, 1 << 22, p=shares / shares.sum()).astype(np.uint16)
    row = factories.token_rows("video", 1)[0]
    shards = []
    for start in range(0, num_samples, per_shard):
        places = random.integers(len(drawn), size=per_shard)
        ids = np.stack([np.take(drawn, at + np.arange(num_ids), mode="wrap") for at in places])
        ids = ids.reshape(per_shard, *shape)
        for frame in range(1, shape[0]):
            same = random.random(ids[:, frame].shape, np.float32) < 0.7
            ids[:, frame][same] = ids[:, frame - 1][same]
        names = [f"{random.bytes(16).hex()}-video-{start + i}-0" for i in range(per_shard)]
        rows = [
            row | {"sample_id": name, "visual_ids": grid.ravel()}
            for name, grid in zip(names, ids, strict=True)
        ]
        shards.append(write_shard(rows, f"{folder}/shard", codebook_size=CODES))
    empty = factories.write_dataset(str(folder), "video", "train", 0)
    return empty.model_copy(
        update={
            "shards": tuple(shards),
            "num_samples": num_samples,
            "latent_shape": shape,
            "codebook_size": CODES,
        }
    )


def read_plainly(dataset: TokenDataset) -> int:
    """Read all ids with pyarrow alone: nothing is checked, shuffled or kept."""
    total = 0
    for shard in dataset.shards:
        table = pq.read_table(storage.local_path(shard.uri))
        ids = table["visual_ids"].combine_chunks().flatten().to_numpy()
        total += len(ids) // math.prod(dataset.latent_shape)
    return total


def read_batches(
    dataset: TokenDataset, *, block_bytes: int, num_threads: int, step_s: float
) -> tuple[int, float]:
    """Load an epoch; return its samples and the seconds in which steps after the first waited.

    As in the trainer, a batch is put together while the step before learns from its own.
    """
    num_steps = dataset.num_samples // BATCH
    waited = 0.0
    with (
        TokenLoader(
            dataset,
            batch_size=BATCH,
            num_steps=num_steps,
            seed=0,
            block_bytes=block_bytes,
            num_threads=num_threads,
        ) as loader,
        ThreadPoolExecutor(1) as ahead,
    ):
        following = ahead.submit(loader.batch, 0)
        for step in range(num_steps):
            started = time.perf_counter()
            following.result()
            waited += (time.perf_counter() - started) * (step > 0)
            if step + 1 < num_steps:
                following = ahead.submit(loader.batch, step + 1)
            time.sleep(step_s)
    return num_steps * BATCH, waited


def peak_bytes() -> int:
    """Return the most memory this process has held since it was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def measure(what: str, manifest: str, options: dict[str, float]) -> dict[str, float]:
    """Run one side of a row in this process."""
    dataset = TokenDataset.model_validate_json(Path(manifest).read_text())
    if latency_s := options.pop("latency_s", 0.0):
        read = storage.read_bytes

        def slowly(uri: str) -> bytes:
            time.sleep(latency_s)
            return read(uri)

        storage.read_bytes = slowly
    Path("/proc/self/clear_refs").write_text("5")
    before, started, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    if what == "plain":
        count, waited = read_plainly(dataset), 0.0
    else:
        count, waited = read_batches(
            dataset,
            block_bytes=int(options.get("block_bytes", BLOCK_BYTES)),
            num_threads=int(options.get("num_threads", READ_THREADS)),
            step_s=options.get("step_s", 0.0),
        )
    wall_s = time.perf_counter() - started
    return {
        "samples_per_s": count / wall_s,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": peak_bytes() / 1e6,
        "extra_mb": (peak_bytes() - before) / 1e6,
        "wait_share": waited / wall_s,
    }


def in_fresh_process(what: str, manifest: Path, **options: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", what, str(manifest), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def saved(folder: Path, dataset: TokenDataset, name: str = "all") -> Path:
    """Write the manifest of a data set for the processes that read it."""
    path = folder / f"{name}.json"
    path.write_text(dataset.model_dump_json())
    return path


def throughput(scale: int) -> None:
    """Samples a second of an epoch, both sides in turn."""
    print("| reading an epoch | samples | pyarrow | ours | ratio | of processor time | goal |")
    print("|---|---|---|---|---|---|---|")
    for num_ids, num_samples, per_shard in ((2560, 40_960, 256), (33_280, 5_120, 128)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = num_samples // scale
            manifest = saved(folder, write_data(folder, num_ids, count, per_shard))
            runs: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
            for _ in range(3):
                for side, found in runs.items():
                    found.append(in_fresh_process(side, manifest))
        (plain, plain_cpu), (ours, cpu) = (
            [statistics.median(run[key] for run in found) for key in ("samples_per_s", "cpu_s")]
            for found in runs.values()
        )
        rates = f"{plain:,.0f}/s | {ours:,.0f}/s | **{ours / plain:.2f}**"
        cells = f"{count:,} | {rates} | {plain_cpu / cpu:.2f}"
        print(f"| samples of {num_ids:,} ids | {cells} | 0.8 |", flush=True)


def memory(scale: int) -> None:
    """Peak of memory of an epoch of a data set and of the tenth part of it."""
    print(
        "\n| peak of memory | samples | a tenth | all | ratio | goal |\n|---|---|---|---|---|---|"
    )
    for num_ids, num_samples, per_shard in ((2560, 204_800, 512), (33_280, 16_640, 64)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = num_samples // scale
            dataset = write_data(folder, num_ids, count, per_shard)
            shards = dataset.shards[: len(dataset.shards) // 10]
            tenth = dataset.model_copy(
                update={"shards": shards, "num_samples": len(shards) * per_shard}
            )
            found = [
                in_fresh_process(
                    "ours",
                    saved(folder, each, str(each.num_samples)),
                    block_bytes=SMALL_BLOCK_BYTES,
                )
                for each in (tenth, dataset)
            ]
        small, large = (each["peak_mb"] for each in found)
        extra = " | ".join(
            f"{each['peak_mb']:,.0f} MB, {each['extra_mb']:,.0f} by reading" for each in found
        )
        print(
            f"| samples of {num_ids:,} ids | {count:,} | {extra} | **{large / small:.2f}** | 1.2 |",
            flush=True,
        )


def stalls(scale: int) -> None:
    """Share of time in which steps of 20 ms wait, the first one, which nothing can precede, not."""
    step = f"a step of {STEP_S * 1000:.0f} ms, batch {BATCH}"
    print(f"\n| {step} | reads take | waiting |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = 40_960 // scale
        manifest = saved(folder, write_data(folder, 2560, count, 64))
        for latency_s, num_threads in ((0.0, 4), (LATENCY_S, 4), (LATENCY_S, 1)):
            found = in_fresh_process(
                "ours",
                manifest,
                latency_s=latency_s,
                num_threads=num_threads,
                step_s=STEP_S,
                block_bytes=SMALL_BLOCK_BYTES,
            )
            slower = f"{latency_s * 1000:.0f} ms longer" if latency_s else "as long as they take"
            share = f"**{100 * found['wait_share']:.1f} %**"
            print(f"| threads: {num_threads} | {slower} | {share} |", flush=True)


TABLES: dict[str, Callable[[int], None]] = {
    "throughput": throughput,
    "memory": memory,
    "stalls": stalls,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all if none is named")
    parser.add_argument("--scale", type=int, default=1, help="data sets so many times smaller")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        what, manifest, values = options.one
        print(json.dumps(measure(what, manifest, json.loads(values))))
        return
    for name in options.tables or TABLES:
        TABLES[name](options.scale)


if __name__ == "__main__":
    main()
