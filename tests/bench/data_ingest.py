"""Benchmark of ingestion and tokenization on Ray against plain loops over the same library calls.

    python tests/bench/data_ingest.py                  # everything: some minutes, two cores
    python tests/bench/data_ingest.py --rows tokenize  # some rows

The plain loop is one process that calls the library file by file or clip by clip, with one thread
for decoders, OpenCV and torch alike (as the workers have), without records, shards or commits. Rows
say how many files or clips a second are done in the steady state: from the moment when every worker
has finished its first unit, so that what Ray needs to start actors is a row of its own. Every
measurement is made in a fresh process, and the better of two counts. Processor time is that of
all processes, Ray's own included. Peaks of memory are those of the whole life of a process.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import psutil
import torch

from tasks import cluster
from tasks.settings import RuntimeSettings
from tests import factories, media
from ursa import ingestion
from ursa.artifacts import Clip, IngestedVideo
from ursa.config import RunConfig, load_config
from ursa.data.units import TokenizedUnit
from ursa.sources.listing import discover_videos
from ursa.tokenization import ClipTokenizer, encode_clip, plan_tokenization, read_clip
from ursa.tokenizers.visual import load_visual_tokenizer
from ursa.video.decode import video_info
from ursa.video.normalise import normalise
from ursa.video.probe import ChildRequest, copy_foreign_file

SPARSE = {
    "window_stride_s": 2.0,
    "image_stride_s": 2.0,
    "image_variants": 0,
    "video_variants": 0,
}
"""Few samples a clip: decoding takes most of the time."""
Found = dict[str, float]


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has held, MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) / 1000 if found else 0.0


def tree_cpu_s() -> float:
    """Return the processor time of this process and all below it, ended ones too, seconds."""
    me, used_s = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            used_s += sum(process.cpu_times()[:4])
    return used_s


class Clock:
    """Notes when units finish, and how much time and memory all processes have used by then."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._start_s = time.perf_counter()
        self._times_s: list[float] = []
        self._worker_mb = self._decoder_mb = 0.0
        self._cpu_s: list[float] = []

    def __call__(self, done: int, total: int) -> None:
        self._times_s.append(time.perf_counter())
        if done in (self._num_workers, total - 1):
            self._cpu_s.append(tree_cpu_s())
        if done == total - 1:  # the last worker is still there
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):  # it has just ended
                    command = " ".join(process.cmdline())
                    if command.startswith("ray::_Unit"):
                        self._worker_mb = max(self._worker_mb, peak_mb(process.pid))
                    if "ursa.video.reader" in command:
                        self._decoder_mb = max(self._decoder_mb, peak_mb(process.pid))

    def found(self, units_of: float) -> Found:
        first = self._num_workers - 1
        return {
            "per_s": units_of
            * (len(self._times_s) - 1 - first)
            / (self._times_s[-1] - self._times_s[first]),
            "cpu_s": (self._cpu_s[-1] - self._cpu_s[0])
            / (units_of * (len(self._times_s) - 2 - first)),
            "start_s": self._times_s[first] - self._start_s,
            "driver_mb": peak_mb(os.getpid()),
            "worker_mb": self._worker_mb,
            "decoder_mb": self._decoder_mb,
        }


def plain(count: int, start_s: float, start_cpu_s: float) -> Found:
    return {
        "per_s": count / (time.perf_counter() - start_s),
        "cpu_s": (time.process_time() - start_cpu_s) / count,
    }


def settings(num_workers: int) -> RuntimeSettings:
    return RuntimeSettings(launcher="ray", num_workers=num_workers, data_uri="/nowhere")


def same(unit: Any) -> Any:
    return unit


def ingest(folder: Path, side: str, count: int) -> Found:
    """files of 20 s, 640 x 360 px, to clips and scores"""
    source = folder / "videos"
    source.mkdir()
    for index in range(count):
        frames = media.panning(480, step=2, height=360, width=640, seed=index)
        media.save_video(source / f"{index}.mp4", frames, 24.0)
    config = load_config("tiny").ingestion
    if side == "plain":
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for path in sorted(source.iterdir()):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _, demuxer = copy_foreign_file(path, Path(scratch), config)
                normalise(Path(scratch), ChildRequest(demuxer=demuxer, config=config))
        return plain(count, start_s, start_cpu_s)
    cluster._connect(settings(int(side)))
    unit = functools.partial(ingestion.ingest_video, output_uri=str(folder / "out"), config=config)
    clock = Clock(int(side))
    found = list(
        cluster.map_units(
            functools.partial(same, unit),
            discover_videos(str(source)),
            IngestedVideo,
            settings(int(side)),
            on_progress=clock,
        )
    )
    assert all(video.clips for video in found)
    return clock.found(1.0)


def make_clips(folder: Path, count: int, *, num_files: int, num_frames: int, height: int) -> list:
    """Return clips of some files under many names."""
    clips: list[Clip] = []
    for number in range(num_files):
        frames = media.panning(
            num_frames, step=2, height=height, width=height * 16 // 18 * 2, seed=number
        )
        path = media.save_video(folder / f"clip{number}.mp4", frames, 24.0)
        info = video_info(path)
        clips += [
            factories.clip_of(path, caption="a pan", info=info, index=index)
            for index in range(number, count, num_files)
        ]
    return clips


def tokenize_with(folder: Path, side: str, clips: Sequence[Clip], config: RunConfig) -> Found:
    tokenizer = factories.write_visual_tokenizer(str(folder))
    values = config.tokenization
    if side.startswith("plain"):
        if side == "plain, all threads":
            torch.set_num_threads(os.cpu_count() or 1)
        if side == "plain, one core":  # decord decodes ahead in a thread of its own
            os.sched_setaffinity(0, {0})
        network = load_visual_tokenizer(Path(tokenizer.directory_uri))
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for clip in clips:
            encode_clip(clip, "train", read_clip(clip, "train", values), network, values)
        return plain(len(clips), start_s, start_cpu_s)
    cluster._connect(settings(int(side)))
    selection = factories.commit_selection(str(folder / "s"), list(clips))
    plan = plan_tokenization(selection, tokenizer, config, output_uri=str(folder / "out"))
    clock = Clock(int(side))
    units = list(
        cluster.map_units(
            functools.partial(ClipTokenizer, tokenizer, config),
            plan.todo,
            TokenizedUnit,
            settings(int(side)),
            on_progress=clock,
        )
    )
    assert not any(unit.failed for unit in units)
    return clock.found(len(clips) / len(units))


def tokenize_sparse(folder: Path, side: str, count: int) -> Found:
    """clips of 10 s, 640 x 360 px, few samples each: decoding takes most of it"""
    config = load_config("tiny", {"tokenization": SPARSE})
    clips = make_clips(folder, count, num_files=8, num_frames=240, height=360)
    return tokenize_with(folder, side, clips, config)


def tokenize_tiny(folder: Path, side: str, count: int) -> Found:
    """clips of 5 s, 320 x 180 px, samples as in preset tiny: encoding takes most of it"""
    clips = make_clips(folder, count, num_files=8, num_frames=120, height=180)
    return tokenize_with(folder, side, clips, load_config("tiny"))


def overhead(folder: Path, side: str, count: int) -> Found:
    """one worker on one core with all of Ray: clips of 5 s, 320 x 180 px, a sample every 0.5 s"""
    os.sched_setaffinity(0, {0})
    changes = {"window_stride_s": 0.5, "image_stride_s": 0.5}
    clips = make_clips(folder, count, num_files=8, num_frames=120, height=180)
    return tokenize_with(folder, side, clips, load_config("tiny", {"tokenization": changes}))


def memory(folder: Path, side: str, count: int) -> Found:
    """peaks of memory: short clips, two workers"""
    config = load_config("tiny", {"tokenization": SPARSE})
    clips = make_clips(folder, count, num_files=8, num_frames=30, height=90)
    return tokenize_with(folder, side, clips, config)


ROWS: dict[str, tuple[Callable[[Path, str, int], Found], int, tuple[str, ...]]] = {
    "ingest": (ingest, 16, ("plain", "2")),
    "tokenize-sparse": (tokenize_sparse, 128, ("plain", "plain, one core", "2")),
    "tokenize-tiny": (tokenize_tiny, 48, ("plain", "plain, all threads", "2")),
    "overhead": (overhead, 128, ("plain", "1")),
}
MEMORY_CLIPS = (300, 3000)


def in_fresh_process(name: str, side: str, count: int) -> Found:
    command = [sys.executable, __file__, "--one", name, side, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_rows(names: Sequence[str], repeats: int) -> None:
    def best(name: str, side: str, count: int) -> Found:
        found = [in_fresh_process(name, side, count) for _ in range(repeats)]
        return max(found, key=lambda each: each["per_s"])

    print(
        "| | plain loop, /s | workers | on Ray, /s | ratio | processor time each: plain, Ray "
        "| first units after |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        make, count, sides = ROWS[name]
        loops = {side: best(name, side, count) for side in sides[:-1]}
        ours = best(name, sides[-1], count)
        rates = ", ".join(
            f"{loop['per_s']:.3g}{side.removeprefix('plain').replace(', ', ' with ')}"
            for side, loop in loops.items()
        )
        base = loops["plain"]
        print(
            f"| {name}: {count} {make.__doc__} | {rates} | {sides[-1]} | {ours['per_s']:.3g} | "
            f"**{ours['per_s'] / base['per_s']:.2f}** | {base['cpu_s']:.3g} s, {ours['cpu_s']:.3g} "
            f"s, {ours['cpu_s'] / base['cpu_s']:.2f} | {ours['start_s']:.1f} s |",
            flush=True,
        )


def print_memory() -> None:
    few, many = (in_fresh_process("memory", "2", count) for count in MEMORY_CLIPS)
    print(f"\n| peak of memory, MB | {MEMORY_CLIPS[0]} clips | {MEMORY_CLIPS[1]} clips | ratio |")
    print("|---|---|---|---|")
    for key, what in (
        ("driver_mb", "process that hands out units"),
        ("worker_mb", "worker"),
        ("decoder_mb", "process that decodes"),
    ):
        print(f"| {what} | {few[key]:.0f} | {many[key]:.0f} | **{many[key] / few[key]:.2f}** |")


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, "memory"], help="these rows alone")
    parser.add_argument("--repeats", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, side, count = arguments.one
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        make = memory if name == "memory" else ROWS[name][0]
        with tempfile.TemporaryDirectory() as folder:
            found = make(Path(folder), side, int(count))
            cluster.shutdown()
        print(json.dumps(found))
        return
    names = arguments.rows or [*ROWS, "memory"]
    print(f"{os.cpu_count()} cores, torch {torch.__version__}\n")
    rows = [name for name in names if name in ROWS]
    if rows:
        print_rows(rows, arguments.repeats)
    if "memory" in names:
        print_memory()


if __name__ == "__main__":
    main()
