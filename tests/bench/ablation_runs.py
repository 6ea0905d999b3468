"""What the ablation trains and measures: arms, folds of the clips, one unit of work.

A unit is one arm, or one last stage of it, and one seed: train, measure, commit the result. Unit
and result are plain records, so that units run in processes of their own and an interrupted
ablation goes on.

Dimensions: B = clips, T, H, W = latent frames, rows, columns, V = codes.
"""

import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from tests import factories
from tests.bench.steps import energy_distance, features, pair_shares
from ursa import ingestion, storage
from ursa.artifacts import StageRequest, TokenDataset, TokenDatasets, TokenizerRef
from ursa.config import FrozenModel, RunConfig, StageName, fingerprint, load_config
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenBatch, TokenSamples, spread
from ursa.data.shards import read_shard, write_shard
from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath, ProbabilityPath
from ursa.diffusion.timesteps import inference_times
from ursa.generation.sampler import Draws, Sampling, sample
from ursa.model.transformer import UrsaTransformer, build_transformer
from ursa.sources.listing import discover_videos
from ursa.tokenization import ClipTokenizer, commit_tokens, plan_tokenization
from ursa.tokenizers.text import TextTokenizer
from ursa.tokenizers.visual import AutoencoderTokenizer, load_visual_tokenizer
from ursa.training.distributed import Group
from ursa.training.schedule import build_path, load_codes
from ursa.training.stage import load_text, stage_loader, transformer_config
from ursa.training.text_tokenizer import fit_text_tokenizer
from ursa.training.trainer import Trainer
from ursa.training.validation import measure_grid
from ursa.training.visual_tokenizer import fit_visual_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = ("ursa/data", "ursa/diffusion", "ursa/generation", "ursa/model", "ursa/training")
"""Code that decides a result, beside that of the ablation itself."""
GIVEN = 1
"""Latent frames that are given: the encoded image."""


class Arm(NamedTuple):
    """What is trained.

    Attributes:
        path: The probability path.
        schedule: Of the metric path: fitted to the codebook, so that the mean distance falls
            linearly, or the default (alpha, c) of the official code.
        shift: Timestep shift of training; the sampler has the same.
        is_long: Whether it has more steps, for last stages that begin from its weights.
        other_shifts: Shifts of the sampler that are tried as well.
    """

    path: Literal["metric", "mixture", "masked"] = "metric"
    schedule: Literal["linear", "official"] = "linear"
    shift: float = 1.0
    is_long: bool = False
    other_shifts: tuple[float, ...] = ()


TUNINGS: dict[str, dict[str, Any]] = {
    "synchronous": {"timesteps": "synchronous", "synchronous_fraction": 1.0},
    "asynchronous": {"timesteps": "per_frame"},
    "asynchronous alone": {"timesteps": "per_frame", "synchronous_fraction": 0.0},
}
"""One t a sample; one a latent frame with the preset's share of samples of one t; without any."""
ARMS = {
    "metric": Arm(other_shifts=(2.0, 3.0)),
    "mixture": Arm("mixture"),
    "masked": Arm("masked"),
    "official schedule": Arm(schedule="official"),
    "shift 2": Arm(shift=2.0),
    "shift 3": Arm(shift=3.0),
    "long": Arm(is_long=True),
}
OFFICIAL_SCHEDULE = {"schedule": "fixed", "alpha": 0.9, "c": 3.0}


class Settings(FrozenModel):
    """How much is trained and measured.

    Attributes:
        preset: Network, tokenizers, stages.
        overrides: Values of the configuration that replace those of the preset.
        num_steps: Optimizer steps on videos with one t a sample, of every arm.
        num_long_steps: Likewise, before a last stage.
        num_tuning_steps: Steps of a last stage.
        tuning_rate: Learning rate of a last stage at its begin: with that of the presets, which is
            less, the few steps change nothing that can be measured.
        num_folds: Parts of the clips; seed s holds out part s, modulo their number.
        inference_steps: Steps of the sampler for the three paths.
        few_steps: For all other models.
        windows_per_clip: Windows of a held-out clip that are measured, at most.
        num_drawn: Clips drawn for captions.
    """

    preset: str = "tiny"
    overrides: dict[str, Any] = Field(default_factory=dict)
    num_steps: int = 300
    num_long_steps: int = 600
    num_tuning_steps: int = 240
    tuning_rate: float = 1e-3
    num_folds: int = 3
    inference_steps: tuple[int, ...] = (4, 8, 16, 32)
    few_steps: tuple[int, ...] = (4, 16)
    windows_per_clip: int = 5
    num_drawn: int = 24

    def config(self, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """Return the configuration, with some values replaced."""
        return load_config(self.preset, factories.merged(self.overrides, changes or {}))


QUICK = Settings(
    overrides={
        "visual_tokenizer": {"max_steps": 2, "hidden_channels": 8},
        "tokenization": {"window_stride_s": 0.5, "image_stride_s": 1.0, "image_variants": 1},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1},
        "evaluation": {"timesteps": [0.0, 0.5]},
    },
    num_steps=3,
    num_long_steps=4,
    num_tuning_steps=2,
    num_folds=2,
    inference_steps=(2, 4),
    few_steps=(2,),
    windows_per_clip=1,
    num_drawn=4,
)
"""Whether all of it works; the numbers mean nothing."""


class Prepared(FrozenModel):
    """The data: tokens of all clips, and their division into folds."""

    datasets: TokenDatasets
    folds: tuple[TokenDatasets, ...]
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef
    clips_by_fold: tuple[tuple[str, ...], ...]


class UnitResult(FrozenModel):
    """What a unit has measured.

    Attributes:
        arm: Name in `ARMS`.
        seed: Seed of weights, order and noise; decides the fold that is held out as well.
        values: Numbers by (model, measure), joined by "/": see `Measures`.
        by_clip: Of measures that belong to held-out clips, the mean of each clip's windows.
        seconds: By what they were spent on.
        weights_uri: Weights that last stages begin from, if there are any.
    """

    arm: str
    seed: int
    values: dict[str, float]
    by_clip: dict[str, dict[str, float]]
    seconds: dict[str, float]
    weights_uri: str | None = None


def prepare(source: str, uri: str, settings: Settings, pool: Executor) -> Prepared:
    """Ingest, select, fit the tokenizers and tokenize what is not done yet; divide the clips."""
    config = settings.config()
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
    folds = divide_clips(_clip_counts(datasets), settings.num_folds)
    return Prepared(
        datasets=datasets,
        folds=tuple(
            _fold(datasets, held_out, settings, f"{uri}/ablation/folds/{number}")
            for number, held_out in enumerate(folds)
        ),
        visual_tokenizer=visual,
        text_tokenizer=text,
        clips_by_fold=folds,
    )


def divide_clips(counts: Mapping[str, int], num_folds: int) -> tuple[tuple[str, ...], ...]:
    """Divide clips into folds of about as many windows: the largest first, each to the least."""
    folds: list[list[str]] = [[] for _ in range(num_folds)]
    for clip in sorted(counts, key=lambda each: (-counts[each], each)):
        min(folds, key=lambda fold: sum(counts[each] for each in fold)).append(clip)
    return tuple(tuple(sorted(fold)) for fold in folds)


def _rows(dataset: TokenDataset) -> list[dict[str, Any]]:
    tables = [
        read_shard(shard, codebook_size=dataset.codebook_size).to_pylist()
        for shard in dataset.shards
    ]
    return sorted((row for rows in tables for row in rows), key=lambda row: row["sample_id"])


def _clip_counts(datasets: TokenDatasets) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for dataset in (datasets.video_train, datasets.video_validation):
        for row in _rows(dataset):
            counts[row["clip_id"]] += 1
    return counts


def _fold(
    datasets: TokenDatasets, held_out: Sequence[str], settings: Settings, uri: str
) -> TokenDatasets:
    """Return data sets of videos in which some clips are held out, at most so many windows each."""
    whole = datasets.video_train
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for dataset in (whole, datasets.video_validation):
        for row in _rows(dataset):
            rows[row["clip_id"]].append(row)
    train = [row for clip in sorted(rows) if clip not in held_out for row in rows[clip]]
    validation = [
        rows[clip][place]
        for clip in sorted(held_out)
        for place in spread(len(rows[clip]), settings.windows_per_clip)
    ]
    parts = {}
    for split, chosen in (("train", train), ("validation", validation)):
        shard = write_shard(chosen, f"{uri}/{split}", codebook_size=whole.codebook_size)
        parts[f"video_{split}"] = whole.model_copy(
            update={
                "split": split,
                "shards": (shard,),
                "num_samples": len(chosen),
                "num_tokens": len(chosen) * int(np.prod(whole.latent_shape)),
                "fingerprint": fingerprint("ablation-fold", whole.fingerprint, shard.sha256),
            }
        )
    print_ = fingerprint(*(part.fingerprint for part in parts.values()))
    return datasets.model_copy(update={**parts, "extra_buckets": (), "fingerprint": print_})


def code_digest() -> str:
    """Return a hash of the code that decides a result."""
    files = [path for name in SOURCES for path in (ROOT / name).rglob("*.py")]
    files += [Path(__file__), Path(__file__).with_name("steps.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Unit(FrozenModel):
    """One piece of work: an arm, or a last stage of the long one."""

    arm: str
    tuning: str | None = None
    seed: int
    settings: Settings
    prepared: Prepared
    uri: str
    code: str

    @property
    def result_uri(self) -> str:
        """Where its result is committed."""
        name = fingerprint("ablation", self.model_dump(mode="json", exclude={"uri"}))
        return storage.join(self.uri, "ablation", "units", f"{name[:32]}.json")

    @property
    def name(self) -> str:
        """Name of its model."""
        return self.tuning or self.arm

    @property
    def start(self) -> "Unit | None":
        """The unit whose weights it begins from."""
        return self.model_copy(update={"tuning": None}) if self.tuning else None

    def find(self) -> UnitResult | None:
        """Return the committed result, if there is one."""
        return storage.load_record(self.result_uri, UnitResult)


def run_unit(unit: Unit) -> UnitResult:
    """Train and measure, or return the committed result."""
    done = unit.find()
    if done is not None:
        return done
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arm, name = ARMS[unit.arm], unit.name
    request = _request(unit)
    measures = Measures(unit, request)
    model = first_model(request, measures.path)
    if unit.start is not None:
        model.load_state_dict(_weights(unit.start))
    began = time.perf_counter()
    model = train(request, measures.path, measures.text_tokenizer, model)
    measures.seconds["training"] = time.perf_counter() - began
    measures.measure(name, model)
    for shift in arm.other_shifts:
        measures.draw(f"{name}, drawn with shift {shift:g}", model, shift, unit.settings.few_steps)
    weights_uri = None
    if arm.is_long and not unit.tuning:
        weights_uri = unit.result_uri.removesuffix("json") + "safetensors"
        storage.write_bytes(weights_uri, save(model.state_dict()))
    result = UnitResult(
        arm=unit.arm,
        seed=unit.seed,
        values=measures.values,
        by_clip=measures.by_clip,
        seconds=measures.seconds,
        weights_uri=weights_uri,
    )
    return storage.commit_record(unit.result_uri, result)


def _weights(start: Unit) -> dict[str, Tensor]:
    result = start.find()
    assert result is not None
    assert result.weights_uri is not None
    return load(storage.read_bytes(result.weights_uri))


def _request(unit: Unit) -> StageRequest:
    arm, settings, prepared = ARMS[unit.arm], unit.settings, unit.prepared
    stage: StageName = "async_finetune" if unit.tuning else "video_pretrain"
    values: dict[str, Any] = {"timestep_shift": arm.shift}
    if unit.tuning:
        values |= {"max_steps": settings.num_tuning_steps, "learning_rate": settings.tuning_rate}
        values |= TUNINGS[unit.tuning]
    else:
        values["max_steps"] = settings.num_long_steps if arm.is_long else settings.num_steps
    path = OFFICIAL_SCHEDULE if arm.schedule == "official" else {}
    changes = {"seed": unit.seed, "stages": {stage: values}, "path": path}
    return StageRequest(
        stage=stage,
        config=settings.config(changes),
        datasets=prepared.folds[unit.seed % len(prepared.folds)],
        visual_tokenizer=prepared.visual_tokenizer,
        text_tokenizer=prepared.text_tokenizer,
        init_from=None,
        output_uri=unit.uri,
    )


def _path(arm: Arm, request: StageRequest) -> ProbabilityPath:
    size = request.visual_tokenizer.vocab_size
    match arm.path:
        case "metric":
            return build_path(request)
        case "mixture":
            return MixturePath(size)
        case "masked":
            return MaskedPath(size)


def first_model(request: StageRequest, path: ProbabilityPath) -> UrsaTransformer:
    """Return the network before training: the same weights whatever the path.

    The mask of a masked path gets an embedding of its own, after those of the codes; the head has
    no row for it, as no clean token is a mask.
    """
    codes, _ = load_codes(request.visual_tokenizer)
    seed = request.config.seed
    model = build_transformer(transformer_config(request), seed=seed, codebook=codes)
    if isinstance(path, MaskedPath):
        known = model.model.embed_tokens.weight.detach()
        generator = torch.Generator().manual_seed(address_seed(seed, "mask"))
        mask = known.shape[1] ** -0.5 * torch.randn(1, known.shape[1], generator=generator)
        model.model.embed_tokens = nn.Embedding.from_pretrained(
            torch.cat([known, mask]), freeze=False
        )
    return model


def train(
    request: StageRequest,
    path: ProbabilityPath,
    text_tokenizer: TextTokenizer,
    model: UrsaTransformer,
) -> UrsaTransformer:
    """Train a network by the project's own trainer; return the averaged weights."""
    stage = getattr(request.config.stages, request.stage)
    trainer = Trainer(
        stage=request.stage,
        config=stage,
        seed=request.config.seed,
        model=model,
        path=path,
        text_tokenizer=text_tokenizer,
        loader=stage_loader(request),
        max_prompt_length=request.config.text_tokenizer.max_prompt_length,
        group=Group(0, 1),
    )
    with closing(trainer):
        for step in range(stage.max_steps):
            trainer.step(step)
    average = trainer.average.module
    assert isinstance(average, UrsaTransformer)
    return average.eval()


class Measures:
    """Measures models of one arm and seed.

    The names of what comes out, behind the name of the model:

    - `grid_*_loss`, `grid_*_accuracy`: of the next token, mean over a grid of t, on the noise of
      the linear metric path (metric arms alone; `sync` and `i2v`, where the first frame is clean);
    - `i2v_accuracy@n`, `i2v_distance@n`, `i2v_psnr@n`: continuations of the first latent frame by n
      steps, against the real one: equal tokens, squared distance of codes, decoded frames in dB;
    - `unigram@n`, `pairs@n`, `energy@n`: clips drawn for captions against training windows.
    """

    def __init__(self, unit: Unit, request: StageRequest) -> None:
        settings = unit.settings
        self.seed, self.settings, self.config = unit.seed, settings, request.config
        self.shift = ARMS[unit.arm].shift
        self.path = _path(ARMS[unit.arm], request)
        yardstick = request.model_copy(update={"config": settings.config({"seed": unit.seed})})
        self.yardstick = build_path(yardstick) if isinstance(self.path, MetricPath) else None
        self.text_tokenizer = load_text(request.text_tokenizer)
        self.visual_tokenizer = _load_visual(request.visual_tokenizer)
        self.codebook = self.visual_tokenizer.codebook
        self.held_out = TokenSamples(request.datasets.video_validation)
        train = TokenSamples(request.datasets.video_train)
        order = np.random.default_rng(unit.seed).permutation(len(train)).tolist()
        self.chosen = train.batch(order[: settings.num_drawn])
        others = train.batch(order[settings.num_drawn :]).visual_ids
        self.reference = (
            features(others, self.codebook),
            pair_shares(others, self.codebook),
            self._unigram(others),
        )
        self.clean = self.held_out.batch(range(len(self.held_out)))
        self.decoded = self._decode(self.clean.visual_ids)
        self.values: dict[str, float] = {}
        self.by_clip: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self._note_floors()

    def measure(self, name: str, model: UrsaTransformer) -> None:
        """Measure a model in all ways."""
        began = time.perf_counter()
        self._grids(name, model)
        self.seconds[f"grids, {name}"] = time.perf_counter() - began
        is_path = name in {arm.path for arm in ARMS.values()}
        counts = self.settings.inference_steps if is_path else self.settings.few_steps
        self.draw(name, model, self.shift, counts)

    def draw(self, name: str, model: UrsaTransformer, shift: float, counts: Sequence[int]) -> None:
        """Measure what a model draws in so many steps, with a shift of the sampler's times."""
        began = time.perf_counter()
        for steps in counts:
            codes = self._draw(model, self.clean, GIVEN, steps, shift)
            self._note_continuation(name, steps, codes)
            codes = self._draw(model, self.chosen, 0, steps, shift)
            self._note_statistics(name, f"@{steps}", codes)
        self.seconds[f"drawing, {name}"] = time.perf_counter() - began

    def _grids(self, name: str, model: UrsaTransformer) -> None:
        if self.yardstick is None:
            return
        for short, setting in (("sync", "synchronous"), ("i2v", "image_to_video")):
            grid = measure_grid(
                model,
                self.yardstick,
                self.text_tokenizer,
                self.held_out,
                timesteps=self.config.evaluation.timesteps,
                batch_size=self.config.evaluation.batch_size,
                max_prompt_length=self.config.text_tokenizer.max_prompt_length,
                seed=address_seed(0, "ablation"),
                setting=setting,
            )
            self._note_by_clip(f"{name}/grid_{short}_loss", grid.sample_loss)
            self._note_by_clip(f"{name}/grid_{short}_accuracy", grid.sample_accuracy)
            for place, t in enumerate(grid.timesteps):
                key = f"{name}/grid_{short}"
                self.values[f"{key}_loss_t{t:g}"] = grid.loss_by_time[place]
                self.values[f"{key}_accuracy_t{t:g}"] = grid.accuracy_by_time[place]

    def _draw(
        self, model: UrsaTransformer, batch: TokenBatch, given: int, steps: int, shift: float
    ) -> Tensor:
        """Draw clips for captions by the exact steps of the path, from the model's own law."""
        codes = batch.visual_ids
        seeds = [address_seed(self.seed, "draw", str(given), name) for name in batch.sample_ids]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = Draws(generators, len(codes), tuple(codes.shape[1:]), "per_token")
        is_given = torch.arange(codes.shape[1]) < given
        start = torch.where(is_given[:, None, None], codes, draws.source(self.path))
        text = self._text(batch)
        with torch.inference_mode():
            return sample(
                model,
                self.path,
                start,
                begins=is_given.float(),
                text_ids=text,
                negative_ids=text,
                sampling=Sampling(
                    times=tuple(inference_times(steps, shift).tolist()),
                    scale=1.0,
                    trunc=1.0,
                    temperature=1.0,
                    top_k=None,
                    top_p=None,
                    draw_order="per_token",
                    solver="exact",
                ),
                draws=draws,
                on_step=lambda _step, _t, codes: (codes, False),
                progress=lambda steps: steps,
            )

    def _note_continuation(self, name: str, steps: int | None, codes: Tensor) -> None:
        real, drawn = self.clean.visual_ids[:, GIVEN:], codes[:, GIVEN:]
        directions = nn.functional.normalize(self.codebook, dim=-1)
        distance = (directions[real] - directions[drawn]).square().sum(-1)
        error = (self._decode(codes) - self.decoded).square().mean((1, 2, 3, 4))
        at = "" if steps is None else f"@{steps}"
        for key, value in (
            ("accuracy", (real == drawn).float().flatten(1).mean(-1)),
            ("distance", distance.flatten(1).mean(-1)),
            ("psnr", 10 * torch.log10(255**2 / error.clamp_min(1e-3))),
        ):
            self._note_by_clip(f"{name}/i2v_{key}{at}", value.tolist())

    def _note_statistics(self, name: str, at: str, codes: Tensor) -> None:
        rest, shares, unigram = self.reference
        pairs = 0.5 * (pair_shares(codes, self.codebook) - shares).abs().sum()
        self.values[f"{name}/unigram{at}"] = float(
            0.5 * (self._unigram(codes) - unigram).abs().sum()
        )
        self.values[f"{name}/pairs{at}"] = float(pairs)
        self.values[f"{name}/energy{at}"] = 1000 * energy_distance(
            features(codes, self.codebook), rest
        )

    def _note_by_clip(self, key: str, values: Sequence[float]) -> None:
        by_clip: dict[str, list[float]] = defaultdict(list)
        for clip, value in zip(self.held_out.clip_ids, values, strict=True):
            by_clip[clip].append(value)
        self.by_clip[key] = {clip: float(np.mean(each)) for clip, each in by_clip.items()}
        self.values[key] = float(np.mean(list(self.by_clip[key].values())))

    def _note_floors(self) -> None:
        """Note what needs no model: the first frame again and again, and real windows."""
        first = self.clean.visual_ids[:, GIVEN - 1 : GIVEN]
        self._note_continuation("copy", None, first.expand_as(self.clean.visual_ids))
        self._note_statistics("real", "", self.chosen.visual_ids)

    def _unigram(self, codes: Tensor) -> Tensor:
        counts = torch.bincount(codes.flatten(), minlength=len(self.codebook))
        return counts / counts.sum()

    def _text(self, batch: TokenBatch) -> Tensor:
        length = self.config.text_tokenizer.max_prompt_length
        return self.text_tokenizer.encode(list(batch.captions), max_length=length)

    def _decode(self, codes: Tensor) -> Tensor:
        """Return the frames that are not given, float, shape (B, F, H, W, 3)."""
        frames = self.visual_tokenizer.decode(codes, batch_size=8)
        skipped = 1 + (GIVEN - 1) * self.visual_tokenizer.temporal_stride
        return torch.from_numpy(frames[:, skipped:]).float()


def _load_visual(tokenizer: TokenizerRef) -> AutoencoderTokenizer:
    with storage.local_directory(tokenizer.directory_uri) as folder:
        return load_visual_tokenizer(folder)
