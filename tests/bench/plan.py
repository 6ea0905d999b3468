"""`ursa plan` against what training takes: memory and time of small networks on this machine.

    python tests/bench/plan.py                 # small networks, 1 and 2 threads: some minutes
    python tests/bench/plan.py --cases deep    # some of them
    python tests/bench/plan.py --cases deep --levels none mlp attention layer --threads 1

Every case trains in a fresh process on token shards that are written for it. Memory is the peak of
resident memory over what the process takes just before the model is built, time the median of the
steps after the second: of the clock, and with one thread of the processor too, which does not
count what other processes take. The prediction is made in this process from the configuration
alone and from a probe of the machine (`ursa.training.probe`) right after each measurement.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import peft  # noqa: F401  (what it takes is no part of a case)
import torch

from tests import factories
from ursa.artifacts import SCHEMA_VERSION, StageRequest, TokenDataset, TokenDatasets, TokenizerRef
from ursa.config import RunConfig, fingerprint, load_config
from ursa.data.shards import write_shard
from ursa.model.pretrained import save_transformer
from ursa.model.size import Clip, Recomputed
from ursa.model.transformer import build_transformer
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.visual import save_visual_tokenizer
from ursa.training import stage as stage_module
from ursa.training.distributed import current_group
from ursa.training.execution import Execution
from ursa.training.plan import DataSize, Machine, StagePlan, plan_run, run_network, stage_clip
from ursa.training.probe import measure_speed

STAGE = "video_pretrain"
NUM_SAMPLES, NUM_STEPS = 64, 7
CASES: dict[str, dict[str, Any]] = {
    # the preset: most of its memory is what libraries take; no constant of the plan is set by it
    "tiny": {},
    # most of its memory is the state of the optimizer
    "wide": {
        "model": {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 5,
                  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        "tokenization": {"num_frames": 5, "height_px": 48, "width_px": 64},
        "visual_tokenizer": {"levels": [8, 5, 5, 5]},
        "stages": {STAGE: {"global_batch_size": 8}},
    },
    # most is activations, and attention has a longer sequence
    "deep": {
        "model": {"hidden_size": 192, "intermediate_size": 512, "num_layers": 12,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48},
        "tokenization": {"num_frames": 17, "height_px": 96, "width_px": 128},
        "visual_tokenizer": {"levels": [8, 5, 5, 5]},
        "stages": {STAGE: {"global_batch_size": 3}},
    },
    # four parts a step, and a large codebook
    "accumulated": {
        "model": {"hidden_size": 256, "intermediate_size": 768, "num_layers": 6,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        "tokenization": {"num_frames": 9, "height_px": 48, "width_px": 64},
        "visual_tokenizer": {"levels": [8, 8, 8, 5, 5]},
        "stages": {STAGE: {"global_batch_size": 16, "gradient_accumulation_steps": 4}},
    },
}  # fmt: skip
# the state of the optimizer is that of adapters alone; the weights are written before
CASES["adapters"] = factories.merged(CASES["wide"], {"stages": {STAGE: {"lora": {}}}})


class Measured(NamedTuple):
    """What a child process has seen."""

    peak_bytes: int
    step_s: float
    processor_s: float


def case_config(name: str) -> RunConfig:
    """Return the configuration of a case."""
    common = {"path": {"schedule": "fixed"}, "text_tokenizer": {"vocab_size": 300}}
    return load_config("tiny", factories.merged(common, CASES[name]))


def predict(
    name: str,
    num_threads: int,
    clock: Callable[[], float] = time.perf_counter,
    level: Recomputed = "none",
) -> StagePlan:
    """Plan a case on this machine."""
    config = case_config(name)
    torch.set_num_threads(num_threads)
    clip, settings = stage_clip(config, STAGE), getattr(config.stages, STAGE)
    micro = -(-settings.global_batch_size // settings.gradient_accumulation_steps)
    speed = measure_speed(run_network(config), clip, micro, settings, clock=clock)
    samples = {"image": 0, "video": NUM_SAMPLES}
    (plan,) = plan_run(
        config,
        Machine(name="cpu"),
        execution=Execution(activation_checkpointing=level),
        speeds={STAGE: speed},
        data=DataSize(num_clips=1, num_train=samples, num_validation=samples, num_tokens=0),
        stages=(STAGE,),
    )
    return plan


def measure(name: str, num_threads: int, level: Recomputed = "none") -> Measured:
    """Train a case in a fresh process."""
    command = [sys.executable, __file__, "--child", name, "--threads", str(num_threads)]
    command += ["--levels", level]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Measured(**json.loads(done.stdout))


def write_request(config: RunConfig, folder: Path) -> StageRequest:
    """Write tokenizers and random samples; return a stage on them."""
    visual = config.visual_tokenizer
    network = FittedAutoencoder(
        FittedConfig(levels=visual.levels, hidden_channels=8, num_residual_blocks=0)
    )
    save_visual_tokenizer(network, folder / "visual")
    reference = TokenizerRef(
        manifest_uri=f"{folder}/visual.json",
        directory_uri=f"{folder}/visual",
        kind="visual",
        vocab_size=visual.codebook_size,
        metrics={},
        fingerprint=fingerprint("visual"),
    )
    video = write_dataset(stage_clip(config, STAGE), visual.codebook_size, folder)
    request = StageRequest(
        stage=STAGE,
        config=config,
        datasets=TokenDatasets(
            manifest_uri=f"{folder}/manifest.json",
            num_failed_clips=0,
            num_short_clips=0,
            fingerprint=fingerprint("datasets"),
            image_train=video,
            image_validation=video,
            video_train=video,
            video_validation=video,
            extra_buckets=(),
        ),
        visual_tokenizer=reference,
        text_tokenizer=factories.write_text_tokenizer(str(folder)),
        init_from=None,
        output_uri=str(folder),
    )
    if getattr(config.stages, STAGE).lora is None:
        return request
    network = build_transformer(stage_module.transformer_config(request), seed=0)
    save_transformer(network, folder / "start")
    values = request.model_dump(mode="json")
    values["config"]["stages"][STAGE]["init_from"] = str(folder / "start")
    return StageRequest.model_validate(values)


def write_dataset(clip: Clip, num_codes: int, folder: Path) -> TokenDataset:
    """Write random samples of a shape as one shard."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns = clip.latent_shape
    ids = torch.randint(num_codes, (NUM_SAMPLES, clip.num_visual_tokens), generator=generator)
    shape = {"num_latent_frames": frames, "num_rows": rows, "num_columns": columns}
    samples = [
        row | shape | {"visual_ids": each.tolist()}
        for row, each in zip(factories.token_rows("video", NUM_SAMPLES), ids, strict=True)
    ]
    return TokenDataset(
        manifest_uri=f"{folder}/manifest.json",
        modality="video",
        split="train",
        bucket=0,
        num_samples=NUM_SAMPLES,
        num_tokens=ids.numel(),
        codebook_size=num_codes,
        visual_tokenizer_fingerprint="v",
        latent_shape=clip.latent_shape,
        shards=(write_shard(samples, f"{folder}/shard", codebook_size=num_codes),),
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint("tokens"),
    )


def train(name: str, num_threads: int, level: Recomputed) -> Measured:
    """Train a case in this process and watch it."""
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        request = write_request(case_config(name), Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_bytes("VmRSS")
        execution = Execution(activation_checkpointing=level)
        trainer = stage_module._build_trainer(request, current_group(), execution)
        clocks = [(time.perf_counter(), time.process_time())]
        run = stage_module._StageRun(request, trainer)
        for step in range(NUM_STEPS):
            trainer.step(step)
            if step == 1:  # a checkpoint is written beside the steps that follow
                run.save(step + 1, {})
            clocks.append((time.perf_counter(), time.process_time()))
        taken = [
            statistics.median(later - sooner for sooner, later in pairwise(each[2:]))
            for each in zip(*clocks, strict=True)
        ]
        run.finish()
        return Measured(_resident_bytes("VmHWM") - before, *taken)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of predicted and measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--levels", nargs="+", choices=get_args(Recomputed), default=["none"])
    parser.add_argument("--child", choices=list(CASES))
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(train(given.child, given.threads[0], given.levels[0])._asdict()))
        return
    print(
        "case         level      threads  clock      memory MB: plan  measured  ratio"
        "  step s: plan  measured  ratio"
    )
    for name, threads, level in itertools.product(given.cases, given.threads, given.levels):
        measured = measure(name, threads, level)
        row = f"{name:12} {level:10} {threads:7}"
        plan = predict(name, threads, level=level)
        report(row, "wall", plan, measured, measured.step_s)
        if threads == 1:
            plan = predict(name, threads, time.process_time, level)
            report(row, "processor", plan, measured, measured.processor_s)


def report(row: str, clock: str, plan: StagePlan, measured: Measured, step_s: float) -> None:
    """Print a row."""
    planned, taken, planned_s = plan.memory.total_bytes, measured.peak_bytes, plan.step_s or 0.0
    print(
        f"{row}  {clock:9} {planned / 1e6:16.1f} {taken / 1e6:9.1f}"
        f" {planned / taken:6.2f} {planned_s:13.3f} {step_s:9.3f} {planned_s / step_s:6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
