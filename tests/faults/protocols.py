"""The protocols of the library on content of a few bytes, and what must hold after any fault.

Each is the real chain of calls that a run makes; only what costs seconds has a stand-in: decoding a
video, encoding a clip, a training step, the weights of a model.
"""

import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests import factories, media
from tests.faults.memory_store import BUCKET, ROOT, Crashed, MemoryStore, in_use
from ursa import ingestion, release, storage, tokenization
from ursa.artifacts import (
    CheckpointRef,
    Clip,
    ClipScores,
    ClipSelection,
    ExportedModel,
    SourceVideo,
    TokenDatasets,
    TokenizerRef,
    VideoInfo,
)
from ursa.config import IngestionConfig, SelectionConfig, fingerprint
from ursa.data.clips import (
    FAILURE_SCHEMA,
    put_table,
    read_clips,
    read_failures,
    read_selection,
)
from ursa.data.shards import read_shard
from ursa.data.units import MODALITIES, SPLITS, expected_sample_ids
from ursa.data.versions import (
    DatasetVersion,
    commit_version,
    compare_files,
    iter_ancestors,
    list_versions,
    read_changes,
    read_version_files,
)
from ursa.decisions import list_decisions, record_decision
from ursa.errors import CheckpointError, UrsaError
from ursa.sources.listing import discover_videos
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.training import stage, trained, visual_tokenizer
from ursa.training.checkpoint import (
    MARKER_FILE,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ursa.training.distributed import Group
from ursa.video.decode import FrameSize
from ursa.video.probe import NormalisedClip, NormalisedVideo

INGESTION = media.ingestion_config()
CONFIG = factories.tiny_config({"tokenization": {"clips_per_shard": 2}})
SELECTION = SelectionConfig.model_validate(
    dict.fromkeys(SelectionConfig.model_fields)
    | {"rules": (), "drop_duplicates": True, "validation_fraction": 0.4, "split_seed": 0}
)
INFO = VideoInfo(width_px=64, height_px=48, fps=12.0, num_frames=18, duration_s=1.5, codec="h264")
SCORES = ClipScores(**dict.fromkeys(ClipScores.model_fields) | {"motion_px_per_s": 5.0})
SAVE_EVERY = 2
MISSING = 1
"""Number of the clip that cannot be read."""
_NONCES = re.compile(rb"(step-\d{8}\.|/)[0-9a-f]{8}(?=/)")


class Work:
    """What was really done.

    Attributes:
        done: A name for every unit, in order.
        acknowledged: The last step that was saved.
        differs: Whether two writers get different bytes from the same content.
        local: `local.writer` is the number of the writer of this thread.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.acknowledged = 0
        self.differs = False
        self.local = threading.local()

    def clear(self) -> None:
        self.done.clear()
        self.acknowledged = 0

    @property
    def writer(self) -> int:
        return int(getattr(self.local, "writer", 0)) if self.differs else 0


class Scenario(NamedTuple):
    """One protocol.

    Attributes:
        name: What it is called in reports.
        start: Store in which it begins.
        run: One run, from looking for what is there to the last manifest.
        problems: What is wrong with a store in which a run has ended.
        interrupted: What is wrong with a store in which a run has broken off.
        rework: How many units may be done again after one interruption.
        work: What has been done.
        is_reproducible: Whether a run leaves the same bytes as any other, and nothing else.
    """

    name: str
    start: MemoryStore
    run: Callable[[], Any]
    problems: Callable[[MemoryStore], list[str]]
    interrupted: Callable[[MemoryStore], list[str]]
    rework: int
    work: Work
    is_reproducible: bool = True


class Run(NamedTuple):
    """One run and what it left: a function of what was there before and of the faults.

    Attributes:
        objects: What is there afterwards.
        trace: Kinds of its operations.
        has_ended: Whether it ended well.
        num_done: Units of work that it did.
        acknowledged: `Work.acknowledged` afterwards.
        problems: What is wrong.
    """

    objects: dict[str, bytes]
    trace: list[str]
    has_ended: bool
    num_done: int
    acknowledged: int
    problems: list[str]


class Runs:
    """Runs of a scenario, each of which is done once: most cases go on where others did."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._known: dict[Any, Run] = {}

    def run(
        self, objects: Mapping[str, bytes], acknowledged: int, faults: Mapping[int, str]
    ) -> Run:
        """Run from what is there; only those faults strike that come before the end."""
        strike: dict[int, str] = {}
        content = tuple(objects.items())
        while True:
            key = (content, acknowledged, tuple(strike.items()))
            if key not in self._known:
                self._known[key] = self._run(objects, acknowledged, strike)
            found = self._known[key]
            later = sorted(faults.keys() - strike.keys())
            if not later or later[0] >= len(found.trace):
                return found
            strike = strike | {later[0]: faults[later[0]]}

    def _run(
        self, objects: Mapping[str, bytes], acknowledged: int, faults: Mapping[int, str]
    ) -> Run:
        scenario, work = self.scenario, self.scenario.work
        work.done.clear()
        work.acknowledged = acknowledged
        store, problems = MemoryStore(objects, faults), []
        has_ended = False
        with in_use(store), repeatable_names(store):
            try:
                scenario.run()
                has_ended = not store.is_dead()
            except Crashed:
                pass
            except UrsaError:
                # a call that is silent once and then answered costs a deadline and a wait
                waits_s = 36 * sum(kind.startswith("timeout") for kind in faults.values())
                if store.now_s > 121 + waits_s:
                    problems.append(f"gave up after {store.now_s:.0f} s")
            except Exception as error:  # noqa: BLE001
                problems.append(f"no typed error but {error!r}")
        num_done = len(work.done)
        if not has_ended:
            problems += scenario.interrupted(store.copy())
        elif not scenario.is_reproducible:
            problems += scenario.problems(store.copy())
        return Run(store.objects, store.trace, has_ended, num_done, work.acknowledged, problems)


@contextlib.contextmanager
def repeatable_names(store: MemoryStore) -> Iterator[None]:
    """What is there decides the random part of names, so that equal runs leave equal names."""

    def token_hex(num_bytes: int) -> str:
        return hashlib.sha256(repr(store.objects).encode()).hexdigest()[: 2 * num_bytes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", token_hex)
        yield


class Clean(NamedTuple):
    """What a run without faults leaves, and how many units of work it took."""

    store: MemoryStore
    num_units: int
    runs: Runs


class Outcome(NamedTuple):
    """What came of a scenario under faults."""

    trace: list[str]
    problems: list[str]


def run_to_end(
    scenario: Scenario, faults: Mapping[int, str], clean: Clean, *, max_runs: int = 6
) -> Outcome:
    """Run again and again until a run ends well, as a user would, and look at what is there."""
    objects: Mapping[str, bytes] = scenario.start.objects
    trace: list[str] = []
    problems: list[str] = []
    num_done = acknowledged = interruptions = 0
    while True:
        left = {place - len(trace): kind for place, kind in faults.items() if place >= len(trace)}
        run = clean.runs.run(objects, acknowledged, left)
        objects, acknowledged = run.objects, run.acknowledged
        trace += run.trace
        problems += run.problems
        num_done += run.num_done
        if run.has_ended:
            break
        interruptions += 1
        if interruptions == max_runs:
            problems.append(f"no end in {max_runs} runs")
            break
    if num_done > clean.num_units + interruptions * scenario.rework:
        problems.append(f"{num_done} units of work, not {clean.num_units}")
    if scenario.is_reproducible:
        problems += differences(objects, clean.store.objects)
    return Outcome(trace, problems)


def clean_run(scenario: Scenario) -> Clean:
    """Run without faults."""
    store = scenario.start.copy()
    scenario.work.clear()
    with in_use(store):
        scenario.run()
    return Clean(store, len(scenario.work.done), Runs(scenario))


def damaged_objects(store: MemoryStore) -> list[str]:
    """Objects whose name holds a hash that they do not have, and records that are none."""
    found = []
    for key, data in store.objects.items():
        match = re.search(r"-([0-9a-f]{16})\.(?:parquet|mp4)$", key)
        if match and hashlib.sha256(data).hexdigest()[:16] != match[1]:
            found.append(f"{key} has other bytes than its name says")
        if key.endswith(".json"):
            try:
                json.loads(data)
            except ValueError:
                found.append(f"{key} is no JSON")
    return found


def differences(found: Mapping[str, bytes], clean: Mapping[str, bytes]) -> list[str]:
    """Where a store is not to the byte what a clean run leaves."""
    return [
        f"{key} is not that of a clean run"
        for key in sorted(found.keys() | clean.keys())
        if found.get(key) != clean.get(key)
    ]


def without_nonces(data: bytes) -> bytes:
    """Take the random part out of names of folders."""
    return _NONCES.sub(rb"\1NONCE", data)


# --- ingestion and selection ----------------------------------------------------------------------


def write_source(folder: Path) -> str:
    """Three readable files, two of them with the same content, and one that is no video."""
    folder.mkdir()
    head = b"\0\0\0\x20ftypisom" + bytes(20)
    (folder / "a.mp4").write_bytes(head + b"first")
    (folder / "a copy.mp4").write_bytes(head + b"first")
    (folder / "b.mp4").write_bytes(head + b"second")
    (folder / "page.mp4").write_bytes(b"<html>no video")
    return str(folder)


def stand_in_for_decoding(work: Work) -> Callable[..., NormalisedVideo]:
    def normalise(folder: Path, _demuxer: str, _config: IngestionConfig) -> NormalisedVideo:
        content = (folder / "input").read_bytes()
        name = "clip-00000.mp4"
        (folder / name).write_bytes(b"clip of " + content + b"!" * work.writer)
        work.done.append(content.decode("latin1"))
        clip = NormalisedClip(
            file_name=name,
            start_s=0.0,
            end_s=1.5,
            info=INFO,
            cropped_px={"left": 0, "top": 0, "right": 0, "bottom": 0},
            scores=SCORES,
        )
        return NormalisedVideo(info=INFO, clips=(clip,), num_dropped_shots=0, num_decode_errors=0)

    return normalise


def ingest(source_uri: str, sources: Sequence[SourceVideo]) -> ClipSelection:
    """What the first two steps of a run do."""
    plan = ingestion.plan_ingestion(source_uri, sources, ROOT, INGESTION)
    clips = plan.committed
    if clips is None:
        todo = [ingestion.ingest_video(source, ROOT, INGESTION) for source in plan.todo]
        clips = ingestion.commit_clips(source_uri, [*plan.done, *todo], ROOT, plan, INGESTION)
    return ingestion.select_clips(clips, SELECTION, output_uri=ROOT)


def clip_problems(source_uri: str, sources: Sequence[SourceVideo]) -> list[str]:
    """Every file once as clips or as a failure, every clip whole, one set, one selection."""
    selection = ingest(source_uri, sources)
    clips, failed = read_clips(selection.clips), read_failures(selection.clips)
    problems = []
    named = sorted({clip.source_uri for clip in clips} | {video.source.uri for video in failed})
    if named != [source.uri for source in sources]:
        problems.append(f"files in the set: {named}")
    if len({(clip.source_uri, clip.clip_id) for clip in clips}) != len(clips):
        problems.append("a clip is there twice")
    for clip in clips:
        damage = storage.damage_of(clip.media_uri, clip.media_sha256)
        problems += [f"{clip.media_uri}: {damage}"] if damage else []
    kept = [item.clip.clip_id for item in read_selection(selection) if item.kept]
    if len(set(kept)) != len(kept) or len(kept) != selection.num_kept:
        problems.append(f"kept {kept}")
    return problems


def ingestion_scenario(folder: Path, patch: pytest.MonkeyPatch, _data: Any = None) -> Scenario:
    """Files to a committed selection."""
    source_uri, work = write_source(folder / "source"), Work()
    sources = discover_videos(source_uri)
    patch.setattr(ingestion, "normalise_video", stand_in_for_decoding(work))

    def problems(store: MemoryStore) -> list[str]:
        with in_use(store):
            return damaged_objects(store) + clip_problems(source_uri, sources)

    def run() -> ClipSelection:
        return ingest(source_uri, sources)

    return Scenario("ingestion", MemoryStore(), run, problems, damaged_objects, rework=1, work=work)


# --- tokenization ---------------------------------------------------------------------------------


class _Reader:
    """Frames of one colour, which tells the content and the length of the file."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def read(
        self, path: Path, indices: Sequence[int], sizes: Sequence[FrameSize]
    ) -> list[np.ndarray]:
        content = path.read_bytes()
        self._work.done.append(content.hex())
        colour = (content[0] + len(content)) % 256
        return [np.full((len(indices), *size, 3), colour, np.uint8) for size in sizes]


class _Encoder:
    """Ids that tell the colour."""

    codebook = range(factories.CODEBOOK_SIZE)

    def __init__(self, work: Work) -> None:
        self._work = work

    def to(self, **_: str) -> "_Encoder":
        return self

    def encode(self, windows: np.ndarray) -> torch.Tensor:
        shape = factories.LATENT_SHAPES["image" if windows.shape[1] == 1 else "video"]
        first = windows[:, 0, 0, 0, 0].astype(int) + self._work.writer
        ids = np.arange(np.prod(shape)) + first[:, None]
        return torch.from_numpy(ids % factories.CODEBOOK_SIZE).reshape(-1, *shape)


def make_selection(num_clips: int, num_validation: int, name: str = "selected") -> ClipSelection:
    """Clips with media of a few bytes; of the second they are missing."""
    clips = []
    for index in range(num_clips):
        media = bytes([index]) * 8
        media_uri = storage.join(ROOT, name, f"media-{index}.mp4")
        if index != MISSING:
            storage.write_bytes(media_uri, media)
        clip = Clip(
            clip_id=fingerprint("clip", index)[:32],
            source_uri=f"s3://{BUCKET}/{index}.mp4",
            source_sha256=fingerprint("source", index),
            start_s=0.0,
            end_s=1.5,
            media_uri=media_uri,
            media_sha256=hashlib.sha256(media).hexdigest(),
            info=INFO,
            scores=SCORES,
            caption=factories.CAPTIONS[index % 4],
        )
        clips.append(clip)
    return factories.commit_selection(
        storage.join(ROOT, name), clips, num_validation=num_validation
    )


def tokenize(selection: ClipSelection, tokenizer: TokenizerRef) -> TokenDatasets:
    """What the tokenization step of a run does."""
    config = CONFIG.model_copy(
        update={"tokenization": CONFIG.tokenization.model_copy(update={"max_failed_fraction": 0.5})}
    )
    plan = tokenization.plan_tokenization(selection, tokenizer, config, output_uri=ROOT)
    if plan.committed is not None:
        return plan.committed
    work = tokenization.ClipTokenizer(tokenizer, config)
    with contextlib.closing(work):
        units = [*plan.done, *(work(unit) for unit in plan.todo)]
    return tokenization.commit_tokens(plan, units, tokenizer, config, output_uri=ROOT)


def is_missing(clip: Clip) -> bool:
    return clip.media_uri.endswith(f"-{MISSING}.mp4")


def token_problems(selection: ClipSelection, tokenizer: TokenizerRef) -> list[str]:
    """Every sample of every readable clip once, nothing else, in shards that are whole."""
    datasets = tokenize(selection, tokenizer)
    problems, failed = [], 0
    for modality in MODALITIES:
        for split in SPLITS:
            dataset = datasets.get(modality, split)
            found = [
                row["sample_id"]
                for shard in dataset.shards
                for row in read_shard(shard, codebook_size=dataset.codebook_size).to_pylist()
            ]
            wanted = [
                name
                for item in read_selection(selection)
                if item.split == split and not is_missing(item.clip)
                for name in expected_sample_ids(item.clip, modality, split, CONFIG.tokenization)
            ]
            failed += sum(
                is_missing(item.clip) and item.split == split
                for item in read_selection(selection)
                if modality == "image"
            )
            if sorted(found) != sorted(wanted) or len(found) != dataset.num_samples:
                problems.append(f"{modality} {split}: {sorted(found)}, expected {sorted(wanted)}")
    if datasets.num_failed_clips != failed:
        problems.append(f"{datasets.num_failed_clips} clips failed, expected {failed}")
    return problems


def tokenization_scenario(folder: Path, patch: pytest.MonkeyPatch, _data: Any = None) -> Scenario:
    """A committed selection to four committed data sets."""
    store, work = MemoryStore(), Work()
    tokenizer = TokenizerRef(
        manifest_uri=f"{folder}/visual.json",
        directory_uri=str(folder),
        kind="visual",
        vocab_size=factories.CODEBOOK_SIZE,
        metrics={},
        fingerprint="visual",
    )
    patch.setattr(tokenization, "load_visual_tokenizer", lambda _: _Encoder(work))
    patch.setattr(tokenization, "ClipReader", lambda: _Reader(work))
    with in_use(store):
        selection = make_selection(3, 1)

    def problems(found: MemoryStore) -> list[str]:
        with in_use(found):
            return damaged_objects(found) + token_problems(selection, tokenizer)

    def run() -> TokenDatasets:
        return tokenize(selection, tokenizer)

    # a unit is two clips on average and four at most
    return Scenario("tokenization", store, run, problems, damaged_objects, rework=2, work=work)


# --- versions of a data set -----------------------------------------------------------------------


def chain_problems() -> list[str]:
    """Numbers without a gap, each the child of the one before, changes that lead from it to it."""
    found: list[str] = []
    chains: dict[str, list[DatasetVersion]] = {}
    for version in list_versions(ROOT):
        chains.setdefault(version.source_uri, []).append(version)
    for source_uri, chain in chains.items():
        numbers = [version.number for version in chain]
        if numbers != list(range(1, len(chain) + 1)):
            found.append(f"{source_uri}: numbers {numbers}")
        if len({version.fingerprint for version in chain}) < len(chain):
            found.append(f"{source_uri}: a version is there twice")
        if list(iter_ancestors(chain[-1])) != chain[::-1]:
            found.append(f"{source_uri}: the parents are not the versions before")
        before: dict[str, str] = {}
        for version in chain:
            files = {row["source_uri"]: row["content"] for row in read_version_files(version)}
            if read_changes(version) != compare_files(before, files):
                found.append(f"{version.manifest_uri}: other changes than from the one before")
            before = files
    return found


def versions_scenario(
    _folder: Path,
    _patch: pytest.MonkeyPatch,
    data: factories.TinyData,
    *,
    is_own: bool = False,
) -> Scenario:
    """The second version of two data sets and the first of another.

    `is_own`: each writer commits a version of its own, else they differ in their code alone.
    """
    store, work = MemoryStore(), Work()

    def commit(selection: ClipSelection) -> DatasetVersion:
        print_ = f"text of {work.writer}" if is_own else "text"
        text = data.text_tokenizer.model_copy(update={"fingerprint": print_})
        tokenizers = (data.visual_tokenizer, text)
        code = {"ursa": f"1.{work.writer}"}
        return commit_version(ROOT, CONFIG, selection, tokenizers, data.datasets, code=code)

    def select(name: str, source_uri: str, num_clips: int) -> ClipSelection:
        selection = make_selection(num_clips, 0, name)
        put_table(storage.join(ROOT, name), "failures", FAILURE_SCHEMA, [])
        clips = selection.clips.model_copy(update={"source_uri": source_uri})
        return selection.model_copy(update={"clips": clips})

    with in_use(store):
        for source_uri in ("first", "second"):
            commit(select(f"old-{source_uri}", source_uri, 2))
        grown = [select(f"new-{name}", name, 3) for name in ("first", "second", "third")]

    def run() -> tuple[DatasetVersion, ...]:
        return tuple(commit(selection) for selection in grown)

    def interrupted(found: MemoryStore) -> list[str]:
        with in_use(found):
            return damaged_objects(found) + chain_problems()

    return Scenario("versions", store, run, interrupted, interrupted, rework=0, work=work)


# --- training -------------------------------------------------------------------------------------


class _Steps:
    """A trainer whose step is a sum: the state after step n tells which steps were done."""

    is_sharded = False

    def __init__(self, config: Any, group: Group, work: Work) -> None:
        self.config, self.group, self._work = config, group, work
        self.loader = SimpleNamespace(samples_seen=lambda count: count * config.global_batch_size)
        self.model = self.trained = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.average = AveragedModel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def step(self, step: int) -> dict[str, float]:
        self._work.done.append(str(step))
        with torch.no_grad():
            self.model.weight.mul_(3).add_(step + 1 + self._work.writer)
        return {"train/loss": float(step)}

    def close(self) -> None:
        pass


def damage_of_checkpoint(stage_uri: str, folder: str) -> str | None:
    """What is wrong with a checkpoint that has a marker."""
    try:
        load_checkpoint(storage.join(stage_uri, folder))
    except CheckpointError as error:
        return str(error)
    return None


def training_scenario(  # noqa: C901  (stand-ins)
    folder: Path, patch: pytest.MonkeyPatch, data: factories.TinyData
) -> Scenario:
    """A stage of six steps with a checkpoint every second one, of which two are kept."""
    # nothing is held out, so nothing is measured
    nothing = data.datasets.video_validation.model_copy(update={"num_samples": 0, "shards": ()})
    datasets = data.datasets.model_copy(update={"video_validation": nothing})
    data = data._replace(datasets=datasets)
    request = factories.stage_request(
        data, "video_pretrain", ROOT, max_steps=6, checkpoint_every=SAVE_EVERY, keep_checkpoints=2
    )
    work, print_ = Work(), stage.stage_fingerprint(request)
    stage_uri = storage.join(ROOT, "checkpoints", "video_pretrain", print_[:32])

    def build(_request: Any, group: Group, _execution: Any) -> _Steps:
        return _Steps(request.config.stages.video_pretrain, group, work)

    def save(*arguments: Any, **options: Any) -> str:
        uri = save_checkpoint(*arguments, **options)
        work.acknowledged = options["step"]
        return uri

    patch.setattr(stage, "_build_trainer", build)
    patch.setattr(stage, "stage_fingerprint", lambda _: print_)
    patch.setattr(stage, "save_checkpoint", save)

    def interrupted(store: MemoryStore) -> list[str]:
        with in_use(store):
            found = latest_checkpoint(stage_uri, fingerprint=print_)
            newest = max((key for key in store.objects if key.endswith(MARKER_FILE)), default="")
            if newest and (damage := damage_of_checkpoint(stage_uri, newest.split("/")[-2])):
                return [damage]
        step = found[1].step if found else 0
        wanted = work.acknowledged
        return [] if step >= wanted else [f"step {wanted} was saved, but {step} is the newest"]

    def problems(store: MemoryStore) -> list[str]:
        with in_use(store):
            result = stage.train_stage(request)
            found = latest_checkpoint(stage_uri, fingerprint=print_)
            if storage.load_record(f"{stage_uri}/manifest.json", CheckpointRef) != result:
                return ["the manifest is not what the stage returned"]
            _, state = load_checkpoint(result.uri)
        wanted = 0.0
        for step in range(6):
            wanted = 3 * wanted + step + 1
        folders = {key.split("/step-")[1].split("/")[0] for key in store.objects if "/step-" in key}
        whole = [key for key in store.objects if key.endswith("COMMITTED.json")]
        wrong = []
        if not work.differs and not bool((state["model.weight"] == wanted).all()):
            wrong.append(f"weights {state['model.weight']}, expected {wanted}")
        if found is None or found[1].step != 6 or result.step != 6:
            wrong.append(f"the newest checkpoint is {found and found[1].step}")
        if len(whole) > len(folders):
            wrong.append("two checkpoints in one folder")
        return wrong

    return Scenario(
        "training",
        MemoryStore(),
        lambda: stage.train_stage(request),
        problems,
        interrupted,
        # a checkpoint that was read by halves is passed over for the one before
        rework=2 * SAVE_EVERY,
        work=work,
        is_reproducible=False,
    )


# --- tokenizer and model directories --------------------------------------------------------------


def release_scenario(folder: Path, patch: pytest.MonkeyPatch, data: factories.TinyData) -> Scenario:
    """A fitted tokenizer with the checkpoints of its fit, then an exported model."""
    work = Work()
    network = FittedAutoencoder(
        FittedConfig(levels=(3, 3), hidden_channels=4, num_residual_blocks=1)
    )
    checkpoint = CheckpointRef(
        uri=f"{ROOT}/checkpoint",
        stage="video_pretrain",
        step=6,
        num_samples_seen=24,
        metrics={},
        fingerprint=fingerprint("checkpoint"),
        parent_uri=None,
    )
    selection_store = MemoryStore()
    with in_use(selection_store):
        selection = make_selection(2, 0)
        videos = factories.write_dataset(storage.join(ROOT, "data"), "video", "train", 4)
    datasets = data.datasets.model_copy(update={"video_train": videos})
    data = data._replace(datasets=datasets)
    request = factories.stage_request(data, "video_pretrain", ROOT)

    def fit(_selection: Any, _config: Any, folder_uri: str, print_: str, _: Any) -> Any:
        fit_uri = storage.join(folder_uri, "fit")
        if latest_checkpoint(fit_uri, fingerprint=print_) is None:
            work.done.append("fit")
            state = {"weight": torch.ones(2)}
            save_checkpoint(state, fit_uri, step=1, num_samples_seen=1, fingerprint=print_, keep=1)
        return network, {"psnr": 1.0}

    def save(_network: Any, target: Path) -> None:
        (target / "config.json").write_text('{"kind": "tokenizer"}')
        (target / "model.safetensors").write_bytes(b"weights" + b"!" * work.writer)

    class Pipeline:
        def __init__(self, **parts: Any) -> None:
            self.parts = parts

        def save_pretrained(self, target: Path, **_: bool) -> None:
            work.done.append("export")
            (target / "transformer").mkdir()
            (target / "transformer" / "model.safetensors").write_bytes(
                b"more weights" + b"!" * work.writer
            )
            (target / "model_index.json").write_text("{}")

    patch.setattr(visual_tokenizer, "_fit", fit)
    patch.setattr(visual_tokenizer, "save_visual_tokenizer", save)
    patch.setattr(trained, "UrsaPipeline", Pipeline)
    patch.setattr(trained, "load_average", lambda *_: None)
    patch.setattr(trained, "scheduler_config", lambda *_, **__: None)
    patch.setattr(trained, "load_visual_tokenizer", lambda _: None)
    patch.setattr(trained, "load_text_tokenizer", lambda _: None)

    def run() -> tuple[TokenizerRef, ExportedModel]:
        tokenizer = visual_tokenizer.fit_visual_tokenizer(selection, CONFIG, output_uri=ROOT)
        return tokenizer, release.export_model(request, checkpoint, output_uri=ROOT)

    def problems(store: MemoryStore) -> list[str]:
        with in_use(store):
            tokenizer, model = run()
            wrong = [
                f"{name}: {damage}"
                for name, sha256 in model.sha256.items()
                if (damage := storage.damage_of(storage.join(model.directory_uri, name), sha256))
            ]
            with storage.local_directory(tokenizer.directory_uri) as found:
                names = sorted(path.name for path in found.iterdir())
            with storage.local_directory(model.directory_uri) as found:
                files = [item for item in found.rglob("*") if item.is_file()]
        if names != ["config.json", "model.safetensors"]:
            wrong.append(f"the tokenizer has {names}")
        if len(files) != len(model.sha256) or len(files) != 2:
            wrong.append(f"the model has {files}, its record {sorted(model.sha256)}")
        return wrong + damaged_objects(store)

    return Scenario(
        "release",
        selection_store,
        run,
        problems,
        damaged_objects,
        rework=1,
        work=work,
        is_reproducible=False,
    )


# --- decisions ------------------------------------------------------------------------------------


def decisions_scenario(
    _folder: Path, _patch: pytest.MonkeyPatch, _data: Any = None, *, keys: Sequence[str] = "abcdef"
) -> Scenario:
    """Decisions about a model, each made again by every run: all numbered, none there twice."""

    work = Work()

    def run() -> None:
        for key in keys:
            record_decision(
                ROOT,
                "model",
                "refused",
                registry_made_ms=0,
                version=key,
                champion=None,
                champion_before=None,
                previous_uri=None,
                reason="r",
                decided_by=f"writer {work.writer}",
                key=key,
            )

    def interrupted(store: MemoryStore) -> list[str]:
        with in_use(store):
            found = list_decisions(ROOT, "model")
        wrong = damaged_objects(store)
        if [item.number for item in found] != list(range(1, len(found) + 1)):
            wrong.append(f"numbers {[item.number for item in found]}")
        if len({item.key for item in found}) != len(found):
            wrong.append(f"a decision is there twice: {[item.key for item in found]}")
        return wrong

    def problems(store: MemoryStore) -> list[str]:
        with in_use(store):
            missing = set(keys) - {item.key for item in list_decisions(ROOT, "model")}
        return interrupted(store) + [f"{key} is lost" for key in sorted(missing)]

    return Scenario(
        "decisions",
        MemoryStore(),
        run,
        problems,
        interrupted,
        rework=0,
        work=work,
        is_reproducible=False,
    )


SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "ingestion": ingestion_scenario,
    "tokenization": tokenization_scenario,
    "versions": versions_scenario,
    "training": training_scenario,
    "release": release_scenario,
    "decisions": decisions_scenario,
}
