"""Whether the evaluation tells an untrained, a half trained and a trained model apart.

    python tests/bench/evaluation.py /tmp/evaluation     # some minutes on two cores

Trains a preset with the library alone, in the folder given; what is done there already is not done
again. The half trained model is the average of the weights after half of all steps.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests import factories
from ursa import ingestion, storage
from ursa.artifacts import (
    CheckpointRef,
    ClipSelection,
    Measure,
    Measurements,
    StageRequest,
    TokenDatasets,
    TokenizerRef,
)
from ursa.config import STAGES, RunConfig, load_config
from ursa.data.addresses import address_seed
from ursa.data.clips import read_selection
from ursa.evaluation.drawn import measure_drawn
from ursa.evaluation.held_out import held_out_measurements, held_out_metrics
from ursa.evaluation.measures import differences, join
from ursa.generation import UrsaPipeline
from ursa.model.transformer import build_transformer
from ursa.sources.listing import discover_videos
from ursa.tokenization import ClipTokenizer, commit_tokens, plan_tokenization
from ursa.training.checkpoint import load_checkpoint
from ursa.training.stage import load_average, train_stage
from ursa.training.text_tokenizer import fit_text_tokenizer
from ursa.training.trained import trained_pipeline
from ursa.training.visual_tokenizer import fit_visual_tokenizer
from ursa.video.reader import ClipReader


class Data(NamedTuple):
    """What a preset makes of videos, before it trains."""

    selection: ClipSelection
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef
    datasets: TokenDatasets


def bench_config(preset: str, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a preset that keeps the checkpoint after half of all its steps."""
    config = load_config(preset, changes)
    total = sum(getattr(config.stages, stage).max_steps for stage in STAGES)
    half = total // 2 - config.stages.image_pretrain.max_steps
    kept = {"checkpoint_every": half, "keep_checkpoints": 9}
    return load_config(
        preset, factories.merged(changes or {}, {"stages": {"video_pretrain": kept}})
    )


def prepare(source: str, uri: str, config: RunConfig, pool: Executor) -> Data:
    """Ingest, select, fit the tokenizers and tokenize what is not done yet."""
    files = discover_videos(source)
    plan = ingestion.plan_ingestion(source, files, uri, config.ingestion)
    unit = functools.partial(ingestion.ingest_video, output_uri=uri, config=config.ingestion)
    clips = plan.committed or ingestion.commit_clips(
        source, (*plan.done, *pool.map(unit, plan.todo)), uri, plan, config.ingestion
    )
    selection = ingestion.select_clips(clips, config.selection, output_uri=uri)
    visual = fit_visual_tokenizer(selection, config, output_uri=uri)
    text = fit_text_tokenizer(selection, config, output_uri=uri)
    units = plan_tokenization(selection, visual, config, output_uri=uri)
    datasets = units.committed
    if datasets is None:
        work = ClipTokenizer(visual, config)
        done = (*units.done, *(work(unit) for unit in units.todo))
        datasets = commit_tokens(units, done, visual, config, output_uri=uri)
    return Data(selection, visual, text, datasets)


def train(data: Data, uri: str, config: RunConfig) -> tuple[StageRequest, CheckpointRef]:
    """Train all stages; return the last one and its result."""
    checkpoint = None
    for stage in STAGES:
        request = StageRequest(
            stage=stage,
            config=config,
            datasets=data.datasets,
            visual_tokenizer=data.visual_tokenizer,
            text_tokenizer=data.text_tokenizer,
            init_from=checkpoint,
            output_uri=uri,
        )
        checkpoint = train_stage(request)
    return request, checkpoint


MODELS = ("untrained", "half trained", "trained")


def models_of(request: StageRequest, checkpoint: CheckpointRef) -> dict[str, UrsaPipeline]:
    """Return the model before training, after half of all steps and at the end.

    All have the path and the tokenizers of the last one.
    """
    trained = trained_pipeline(request, checkpoint)
    untrained = build_transformer(
        trained.transformer.config,
        seed=address_seed(request.config.seed, "untrained"),
        codebook=trained.visual_tokenizer.codebook,
    )
    parent = checkpoint.parent_uri
    assert parent is not None
    stage_uri = parent.rpartition("/")[0]
    step = request.config.stages.video_pretrain.checkpoint_every
    (half,) = storage.local_path(stage_uri).glob(f"step-{step:08d}.*")
    networks = (untrained, load_average(_reference(half, step), request), trained.transformer)
    return {
        name: UrsaPipeline(
            transformer=network,
            scheduler=trained.scheduler,
            visual_tokenizer=trained.visual_tokenizer,
            text_tokenizer=trained.text_tokenizer,
            defaults=trained.defaults,
        )
        for name, network in zip(MODELS, networks, strict=True)
    }


def _reference(folder: Path, step: int) -> CheckpointRef:
    marker, _ = load_checkpoint(str(folder))
    return CheckpointRef(
        uri=str(folder),
        stage="video_pretrain",
        step=step,
        num_samples_seen=marker.num_samples_seen,
        metrics=marker.metrics,
        fingerprint=marker.fingerprint,
        parent_uri=None,
    )


def measure(
    models: Mapping[str, UrsaPipeline], data: Data, config: RunConfig
) -> dict[str, Measurements]:
    """Measure each model as the flow and `ursa evaluate` do."""
    selected = read_selection(data.selection)
    found = {}
    for name, pipeline in models.items():
        pipeline.set_progress_bar_config(disable=True)
        _, grids = held_out_metrics(pipeline, data.datasets, config)
        with ClipReader() as reader:
            drawn = measure_drawn(pipeline, selected, config, reader.read)
        found[name] = join(held_out_measurements(grids, data.datasets, config), drawn)
    return found


def are_apart(one: Measure, other: Measure) -> bool:
    """Whether two intervals do not overlap."""
    assert None not in {one.low, one.high, other.low, other.high}
    return one.high < other.low or other.high < one.low


def table(found: Mapping[str, Measurements]) -> Iterator[str]:
    """Yield the rows of a Markdown table: values, intervals, and what is told apart."""
    rows = {name: {item.metric: item for item in part.measures} for name, part in found.items()}
    pairs = list(itertools.pairwise(found))
    changes = {
        pair: {item.metric: item for item in differences(found[pair[1]], found[pair[0]])}
        for pair in pairs
    }
    yield "| metric | " + " | ".join([*found, *(f"{a} / {b}" for a, b in pairs)]) + " | paired |"
    yield "|---" * (2 + len(found) + len(pairs)) + "|"
    for metric, last in rows[MODELS[-1]].items():
        if last.low is None or metric.startswith(("real_", "still_")):
            continue
        cells = [
            f"{part[metric].value:.4g} ({part[metric].low:.4g} to {part[metric].high:.4g})"
            for part in rows.values()
        ]
        cells += [
            "apart" if are_apart(rows[one][metric], rows[two][metric]) else "overlap"
            for one, two in pairs
        ]
        verdicts = [changes[pair][metric].verdict for pair in pairs if metric in changes[pair]]
        yield f"| `{metric}` | " + " | ".join(cells) + f" | {', then '.join(verdicts) or '-'} |"


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--source", default="tests/data/videos")
    arguments = parser.parse_args()
    config, uri = bench_config(arguments.preset), str(arguments.folder.absolute())
    with ProcessPoolExecutor(2) as pool:
        data = prepare(arguments.source, uri, config, pool)
    found = measure(models_of(*train(data, uri, config)), data, config)
    for part in found.values():
        for group in part.cases:
            print(f"{group.name}: {len(group.cases)} cases, {len(set(group.units))} {group.unit}s")
        break
    print()
    for row in table(found):
        print(row)


if __name__ == "__main__":
    main()
