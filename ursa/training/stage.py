"""One training stage as a step: from token data sets and a parent to a committed checkpoint."""

import contextlib
import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    CheckpointRef,
    GridSetting,
    LossGrid,
    StageRequest,
    TokenizerRef,
)
from ursa.config import StageConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples
from ursa.data.mixed_loader import MixedLoader, plan_parts
from ursa.errors import CheckpointError, ConfigError, NonFiniteLossError, TrainingError, UrsaError
from ursa.model.adapters import add_adapters
from ursa.model.transformer import TransformerConfig, UrsaTransformer, build_transformer
from ursa.tokenizers.text import TextTokenizer, load_text_tokenizer
from ursa.training.checkpoint import (
    CheckpointMarker,
    CheckpointWriter,
    gathered_copy,
    latest_checkpoint,
    load_checkpoint,
    not_finite,
    restore_state,
    save_checkpoint,
    training_state,
)
from ursa.training.distributed import Group, current_group
from ursa.training.execution import CPU_BACKEND, DEFAULT_EXECUTION, GPU_BACKEND, Execution
from ursa.training.guard import MAX_SKIPPED, SkippedSteps
from ursa.training.merging import publish_merged
from ursa.training.optim import build_average, build_optimizer, trained_part
from ursa.training.plan import uneven_batch
from ursa.training.samples import StageSamples
from ursa.training.schedule import load_codes, path_over
from ursa.training.start import load_start
from ursa.training.termination import TERMINATED, Termination
from ursa.training.trainer import OnMetrics, Trainer
from ursa.training.validation import (
    SETTING_PREFIX,
    change_metrics,
    copy_accuracy,
    gain_metrics,
    grid_metrics,
    measure_grid,
    settings_of,
)

logger = logging.getLogger(__name__)

_VALIDATION_SAMPLES = 32
_CURVE_TIMES = (*(i / 10 for i in range(10)), 0.95, 0.98, 0.99, 0.995, 0.999)
"""Close where the loss falls most, up to the end of what training draws."""
_VALIDATION_SHARE = 0.1
"""Of the time of a stage, what validation may take without a warning."""
_SHORT_S = 600.0
"""A stage that takes less may spend more of it on validation."""
_TAKE_TRIES = 3
_GRACE_S = 25.0
"""How long the other workers have to end by themselves when one has failed."""


def stage_fingerprint(request: StageRequest) -> str:
    """Return what decides the stage: its settings, data, parent, tokenizers and the model.

    Args:
        request: The stage.

    Returns:
        sha256, 64 hexadecimal digits.
    """
    config = request.config
    stage: StageConfig = getattr(config.stages, request.stage)
    return fingerprint(
        SCHEMA_VERSION,
        request.stage,
        config.seed,
        stage,
        config.model,
        config.path,
        config.text_tokenizer,
        request.datasets.fingerprint,
        request.visual_tokenizer.fingerprint,
        request.text_tokenizer.fingerprint,
        # with a start of its own the stage before decides nothing
        request.init_from.fingerprint if request.init_from and not stage.init_from else None,
        *([request.known.fingerprint] if request.known and stage.new_fraction else ()),
    )


def samples_uri(request: StageRequest) -> str:
    """Return where the samples that are drawn at intervals of a stage are.

    Args:
        request: The stage.
    """
    return storage.join(
        request.output_uri, "samples", request.stage, stage_fingerprint(request)[:32]
    )


def find_stage(request: StageRequest) -> CheckpointRef | None:
    """Return the committed result of the stage, if it is there.

    Args:
        request: The stage.

    Raises:
        ManifestError: If its record is damaged.
        StorageError: If the store refuses or does not answer.
    """
    return storage.load_record(_manifest_uri(request), CheckpointRef)


def train_stage(
    request: StageRequest,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    on_metrics: OnMetrics | None = None,
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> CheckpointRef:
    """Train one stage, or return its committed result.

    Every rank of an initialised process group calls it with the same request. It goes on from the
    newest whole checkpoint of the same stage and is then equal to an uninterrupted run to the bit.
    SIGTERM on any rank saves a checkpoint and ends all of them with status 143. Checkpoints are
    written in the background; a save that fails is raised at the next step, the last one is waited
    for. A step whose loss or gradient is not finite on any rank is skipped on all; see
    `ursa.training.guard` for when the stage goes back.

    Args:
        request: Everything that decides the stage.
        execution: How it is computed, the same on all ranks; another one than before a stop may be
            given.
        on_metrics: Called on rank 0 with (step, metrics), steps counted from 1.
        is_told_to_end: Asked after every step; where it holds on any rank that is as SIGTERM.

    Returns:
        The committed checkpoint; its metrics are those of the last step.

    Raises:
        TrainingError: If the loss is not finite again after the stage went back, there is no data,
            or a checkpoint is damaged.
        ConfigError: If the batch cannot be divided evenly among the ranks, layers cannot be
            compiled on this machine, or adapters are to be trained without peft or on random
            weights.
        StorageError: If the store refuses or does not answer.
        SystemExit: With status 143, after SIGTERM, unless the handler of before ends otherwise.
    """
    group = current_group()
    done = group.from_main(lambda: find_stage(request))
    if done is not None:
        return done
    with contextlib.closing(_build_trainer(request, group, execution)) as trainer:
        return _train(request, trainer, group, on_metrics, is_told_to_end)


def _train(
    request: StageRequest,
    trainer: Trainer,
    group: Group,
    on_metrics: OnMetrics | None,
    is_told_to_end: Callable[[], bool],
) -> CheckpointRef:
    config = trainer.config
    run = _StageRun(request, trainer)
    validation = _Validation(request, trainer)
    samples = StageSamples(request, trainer, samples_uri(request))
    metrics: dict[str, float] = {}
    began = time.perf_counter()
    with Termination() as termination, contextlib.closing(run):
        first, metrics = run.resume()
        if first == 0 and samples.is_due(0):
            samples.draw(0)
        for step in range(first, config.max_steps):
            metrics, count = run.step(step), step + 1
            stop = group.any(termination.requested or is_told_to_end())
            due = run.went_back or stop or _is_due(count, config.checkpoint_every, config)
            if due:
                run.check_weights(count)
            metrics["train/skipped_steps"] = float(run.skipped.number())
            validated = _is_due(count, config.validate_every, config)
            if validated:
                metrics |= validation.measure()
            if count == config.max_steps:
                metrics |= validation.final_metrics()
            if samples.is_due(count):
                samples.draw(count)
            logged = validated or step == 0 or _is_due(count, config.log_every, config)
            if group.is_main and on_metrics is not None and logged:
                on_metrics(count, metrics)
            if due:
                run.save(count, metrics)
            if stop:
                run.finish()
                logger.warning("SIGTERM: saved step %d of stage %s", count, request.stage)
                termination.end()
        uri = run.finish()
        _end_if_told(termination, is_told_to_end, group, "the last step of stage", request)
        result = _result(request, trainer, validation, uri, metrics)
        validation.tell_share(time.perf_counter() - began)
        done = group.from_main(lambda: storage.commit_record(_manifest_uri(request), result))
        _end_if_told(termination, is_told_to_end, group, "stage", request)
        return done


def _end_if_told(
    termination: Termination,
    is_told_to_end: Callable[[], bool],
    group: Group,
    what: str,
    request: StageRequest,
) -> None:
    """End all ranks if SIGTERM came since the last step asked."""
    if group.any(termination.requested or is_told_to_end()):
        logger.warning("SIGTERM: saved %s %s", what, request.stage)
        termination.end()


def _result(
    request: StageRequest,
    trainer: Trainer,
    validation: "_Validation",
    uri: str,
    metrics: Mapping[str, float],
) -> CheckpointRef:
    """Measure what is left and merge adapters; all ranks call this."""
    curve, grids = validation.curve(), validation.grids
    merged_uri = None
    if trainer.config.lora is not None:
        merged_uri = publish_merged(
            request,
            trainer,
            base=_parent_uri(request),
            fingerprint=stage_fingerprint(request),
            metrics=metrics,
        )
    return CheckpointRef(
        uri=uri,
        stage=request.stage,
        step=trainer.config.max_steps,
        num_samples_seen=trainer.loader.samples_seen(trainer.config.max_steps),
        metrics={
            # what differs from machine to machine is no part of the result
            key: value
            for key, value in metrics.items()
            if not key.endswith(("_s", "_bytes"))
        },
        loss_curve=tuple(point for point in curve if math.isfinite(point[1])),
        grids=tuple(grid for grid in grids if grid.is_finite),
        fingerprint=stage_fingerprint(request),
        parent_uri=_parent_uri(request),
        merged_uri=merged_uri,
    )


def launch_local(
    request: StageRequest,
    *,
    num_workers: int = 1,
    execution: Execution = DEFAULT_EXECUTION,
    on_metrics: OnMetrics | None = None,
) -> CheckpointRef:
    """Run `train_stage` in processes of this machine; one worker runs in this process.

    Args:
        request: Everything that decides the stage.
        num_workers: Number of processes.
        execution: How it is computed.
        on_metrics: Called in rank 0's process; with several workers it must be picklable.

    Returns:
        The committed checkpoint.

    Raises:
        TrainingError: If a worker failed.
        SystemExit: With status 143, after SIGTERM to this process, which the workers get too, or to
            one of the workers.
    """
    if num_workers == 1:
        return train_stage(request, execution=execution, on_metrics=on_metrics)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (num_workers, port, request, execution, on_metrics)
    workers = spawn(_local_worker, arguments, nprocs=num_workers, join=False)
    with Termination(workers.pids()) as termination:
        try:
            while not workers.join(grace_period=_GRACE_S):
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            if termination.requested or getattr(error, "exit_code", 0) == TERMINATED:
                termination.end()
            raise TrainingError(f"a training worker failed: {error}") from error
    result = find_stage(request)
    if result is None:
        raise TrainingError(f"stage {request.stage} ended without a committed checkpoint")
    return result


def load_average(checkpoint: CheckpointRef, request: StageRequest) -> UrsaTransformer:
    """Return the network with the averaged weights of a checkpoint, in evaluation mode.

    Args:
        checkpoint: A committed checkpoint.
        request: The stage that made it.

    Raises:
        CheckpointError: If it is not committed, damaged, or of another model than the request's.
    """
    model = UrsaTransformer(transformer_config(request))
    _take_average(model, checkpoint)
    return model.eval()


def transformer_config(request: StageRequest) -> TransformerConfig:
    """Return the network's configuration for the tokenizers of a run.

    Args:
        request: Any stage of the run.

    Raises:
        ConfigError: If there is no text tokenizer where the request says.
    """
    with storage.local_directory(request.text_tokenizer.directory_uri) as folder:
        bov_id = load_text_tokenizer(folder).bov_id
    model = request.config.model
    text_size, codebook_size = (
        request.text_tokenizer.vocab_size,
        request.visual_tokenizer.vocab_size,
    )
    return TransformerConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        num_hidden_layers=model.num_layers,
        max_window_layers=model.num_layers,
        rope_theta=model.rope_theta,
        vocab_size=text_size + codebook_size,
        lm_vocab_size=text_size,
        lm_head_size=codebook_size,
        bov_token_id=bov_id,
        head_dim=model.head_dim,
        rms_norm_eps=model.rms_norm_eps,
    )


def load_text(tokenizer: TokenizerRef) -> TextTokenizer:
    """Return a committed text tokenizer.

    Args:
        tokenizer: The committed tokenizer.

    Raises:
        ConfigError: If there is none.
    """
    with storage.local_directory(tokenizer.directory_uri) as folder:
        return load_text_tokenizer(folder)


def _initial_model(request: StageRequest, codes: Tensor) -> UrsaTransformer:
    """Return the network with the weights that a stage begins with, and its adapters if any."""
    stage: StageConfig = getattr(request.config.stages, request.stage)
    if stage.lora is not None and _parent_uri(request) is None:
        raise ConfigError(
            f"stages.{request.stage}.lora needs a stage before or stages.{request.stage}.init_from:"
            " without one the weights are random, and adapters would leave them random"
        )
    config = transformer_config(request)
    if stage.init_from is not None:
        model = load_start(stage.init_from, request, config, codes)
    else:
        model = build_transformer(config, seed=request.config.seed, codebook=codes)
        if request.init_from is not None:
            # a stage starts from the average of the one before: less noise than the last weights
            _take_average(model, request.init_from)
    if stage.lora is not None:
        add_adapters(
            model,
            stage.lora,
            seed=address_seed(request.config.seed, request.stage, "lora"),
            where=f"stages.{request.stage}.lora",
        )
    return model


def _parent_uri(request: StageRequest) -> str | None:
    """Return where the weights lie that a stage begins with; None if they are drawn."""
    stage: StageConfig = getattr(request.config.stages, request.stage)
    if stage.init_from is not None or request.init_from is None:
        return stage.init_from
    return request.init_from.weights_uri


def _build_trainer(
    request: StageRequest, group: Group, execution: Execution = DEFAULT_EXECUTION
) -> Trainer:
    stage = getattr(request.config.stages, request.stage)
    loader = stage_loader(request)
    for size in loader.batch_sizes:
        if size % group.world_size:
            raise ConfigError(uneven_batch(request.stage, stage, size, group.world_size))
    codes, levels = load_codes(request.visual_tokenizer)
    path = path_over(request, codes, levels)
    return Trainer(
        stage=request.stage,
        config=stage,
        seed=request.config.seed,
        model=_initial_model(request, codes),
        path=path,
        text_tokenizer=load_text(request.text_tokenizer),
        loader=loader,
        max_prompt_length=request.config.text_tokenizer.max_prompt_length,
        group=group,
        execution=execution,
    )


def stage_loader(request: StageRequest) -> MixedLoader:
    """Return the batches of a stage: of all buckets, with images among videos where wanted.

    Args:
        request: The stage.

    Raises:
        DataExhaustedError: If there is no sample.
    """
    stage: StageConfig = getattr(request.config.stages, request.stage)
    main = request.datasets.get(stage.modality, "train")
    return MixedLoader(
        plan_parts(
            request.datasets.of(stage.modality, "train"),
            request.datasets.of("image", "train") if stage.image_fraction else (),
            batch_size=stage.global_batch_size,
            image_share=stage.image_fraction,
            known=request.known.of(stage.modality, "train") if request.known else (),
            new_share=stage.new_fraction,
        ),
        num_main_tokens=math.prod(main.latent_shape),
        num_steps=stage.max_steps,
        seed=address_seed(request.config.seed, request.stage, "order"),
    )


def _take_average(model: UrsaTransformer, checkpoint: CheckpointRef) -> None:
    """Load the averaged weights of a checkpoint into a network."""
    _, state = load_checkpoint(checkpoint.weights_uri)
    weights = {k.removeprefix("ema."): v for k, v in state.items() if k[:4] == "ema."}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.weights_uri} does not fit the model of this run; give the model settings "
            f"and tokenizers that it was trained with: {error}"
        ) from error


def _is_due(count: int, every: int, config: StageConfig) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return count % every == 0 or count == config.max_steps


class _StageRun:
    """A stage under way: its checkpoints, and what is done when numbers are not finite.

    All ranks call the same methods, in the same order, and decide alike.
    """

    def __init__(self, request: StageRequest, trainer: Trainer) -> None:
        self.request = request
        self.trainer = trainer
        self.group = trainer.group
        self.skipped = SkippedSteps()
        self.went_back = False
        self._fingerprint = stage_fingerprint(request)
        self._stage_uri = _stage_uri(request)
        self._resumed_uri = ""
        self._writer = CheckpointWriter()

    def resume(self) -> tuple[int, dict[str, float]]:
        """Take over the newest checkpoint; return the steps done and the metrics of the last."""
        marker = self._take_newest()
        if marker is None:
            return 0, {}
        self.skipped = marker.skipped
        logger.info("stage %s goes on from step %d", self.request.stage, marker.step)
        return marker.step, dict(marker.metrics)

    def step(self, step: int) -> dict[str, float]:
        """Do one step, or skip it, which gives no metrics; go back when too many were skipped."""
        self._writer.check()
        self.went_back = False
        try:
            metrics = self.trainer.step(step)
        except NonFiniteLossError as error:
            metrics = {}
            self.skipped = self.skipped.with_step(step)
            logger.warning("skipped: %s", error)
            # nothing is gained by more steps with weights that are not finite
            spoilt = self.group.any(bool(not_finite(self._state())))
            if spoilt or len(self.skipped.recent(step + 1)) >= MAX_SKIPPED:
                self._go_back(step + 1)
        return metrics

    def check_weights(self, count: int) -> None:
        """Go back if anything that a checkpoint holds is not finite, on any rank."""
        bad = not_finite(self._state())
        if bad:
            logger.warning("after step %d not finite: %s", count, ", ".join(bad[:3]))
        if self.group.any(bool(bad)):
            self._go_back(count)

    def save(self, count: int, metrics: Mapping[str, float]) -> None:
        """Begin to write a checkpoint from a copy, which rank 0 alone keeps."""
        state = self._state() if self.group.is_main or self.trainer.is_sharded else {}
        copy = gathered_copy(state, keep=self.group.is_main)
        if not self.group.is_main:
            return
        config = self.trainer.config
        # what may yet be needed to go back is kept: beside a skipped step nothing is removed, nor
        # for a checkpoint that only SIGTERM or going back has made
        regular = _is_due(count, config.checkpoint_every, config) and not self.went_back
        calm = not self.skipped.recent(count)
        save = functools.partial(
            save_checkpoint,
            copy,
            self._stage_uri,
            step=count,
            num_samples_seen=self.trainer.loader.samples_seen(count),
            fingerprint=self._fingerprint,
            keep=config.keep_checkpoints if regular and calm else None,
            metrics=metrics,
            skipped=self.skipped,
        )
        self._writer.submit(save, f"the checkpoint of step {count} at {self._stage_uri}")

    def finish(self) -> str:
        """Wait until the last checkpoint is committed; return its URI (rank 0) on all ranks."""
        uri = self._writer.wait() or self._resumed_uri
        self.group.barrier()
        return uri

    def close(self) -> None:
        """Let the save in flight end, whatever has happened; what it raises is logged."""
        try:
            self._writer.wait()
        except UrsaError as error:
            logger.error("%s", error)

    def _state(self) -> dict[str, Tensor]:
        trainer = self.trainer
        return training_state(trainer.trained, trainer.average, trainer.optimizer)

    def _find(self, wanted: Callable[[int], bool] = lambda _step: True) -> str:
        """Return the URI of the newest whole checkpoint that rank 0 sees, or ""."""

        def find() -> str:
            found = latest_checkpoint(self._stage_uri, fingerprint=self._fingerprint, wanted=wanted)
            return found[0] if found is not None else ""

        return self.group.from_main(find)

    def _take_newest(
        self, wanted: Callable[[int], bool] = lambda _step: True
    ) -> CheckpointMarker | None:
        """Take over the newest whole checkpoint; without one nothing changes."""
        for _ in range(_TAKE_TRIES):
            uri = self._find(wanted)
            if not uri:
                return None
            failure: CheckpointError | None = None
            try:
                marker, state = load_checkpoint(uri)
            except CheckpointError as error:
                # another run of the stage may have removed it since, beside newer ones
                logger.warning("a checkpoint is gone again: %s", error)
                failure = error
            if not self.group.any(failure is not None):
                trainer = self.trainer
                restore_state(state, trainer.trained, trainer.average, trainer.optimizer)
                self._resumed_uri = uri
                return marker
        raise failure or CheckpointError(f"{uri}: another rank cannot read it")

    def _go_back(self, count: int) -> None:
        """Take the weights of before the trouble and leave out the steps since; once a stage."""
        stage, rate = self.request.stage, self.trainer.config.learning_rate
        trouble = (*self.skipped.recent(count), count - 1)
        if self.skipped.taken_back is not None:
            begin, end = self.skipped.taken_back
            raise NonFiniteLossError(
                f"stage {stage}: loss, gradient or weights are not finite again at steps "
                f"{_listed(trouble)}, after steps {begin} to {end - 1} were taken back; the last "
                f"good checkpoint is kept at {self._stage_uri}; lower stages.{stage}.learning_rate "
                f"{rate:g}, raise its warmup_steps, or look at the samples of these steps"
            )
        self._writer.wait()
        every = self.trainer.config.checkpoint_every
        # regular ones alone, so that a run that was interrupted goes back to the same place
        marker = self._take_newest(lambda step: step <= min(trouble) and step % every == 0)
        if marker is None:
            trainer = self.trainer
            codes, _ = load_codes(self.request.visual_tokenizer)
            fresh = trained_part(_initial_model(self.request, codes))
            average = build_average(fresh, trainer.config)
            state = training_state(fresh, average, build_optimizer(fresh, trainer.config))
            restore_state(state, trainer.trained, trainer.average, trainer.optimizer)
        begin = marker.step if marker is not None else 0
        self.skipped = self.skipped.model_copy(update={"taken_back": (begin, count)})
        self.went_back = True
        logger.warning(
            "stage %s: not finite at steps %s; goes back to the weights of step %d and leaves out "
            "steps %d to %d; the next time it stops",
            stage,
            _listed(trouble),
            begin,
            begin,
            count - 1,
        )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(str(step) for step in sorted(set(steps)))


class _Validation:
    """Held-out loss and accuracy of the averaged weights; nothing where nothing was held out.

    Rank 0 measures alone, or all ranks measure the same if each holds a part of the weights.
    """

    def __init__(self, request: StageRequest, trainer: Trainer) -> None:
        stage = trainer.config
        dataset = request.datasets.get(stage.modality, "validation")
        limit = min(_VALIDATION_SAMPLES, request.config.evaluation.max_samples)
        measures = dataset.num_samples and (trainer.group.is_main or trainer.is_sharded)
        self.samples = TokenSamples(dataset, max_samples=limit) if measures else None
        self.request = request
        self.trainer = trainer
        self.spent_s = 0.0
        self._newest: LossGrid | None = None

    def measure(self) -> dict[str, float]:
        """Measure the weights of now: one pass over the grid."""
        if self.samples is None:
            return {}
        before_s = self.spent_s
        self._newest = self._grid()
        metrics = _finite(grid_metrics(self._newest, "val/", by_frame=True))
        return metrics | {"val/measure_s": self.spent_s - before_s}

    def final_metrics(self) -> dict[str, float]:
        """Measure what is too dear for every validation: the other settings, the raw weights.

        Called when the weights are the last of the stage.
        """
        if self.samples is None:
            return {}
        alone, *others = self.grids
        metrics: dict[str, float] = {}
        if not self.trainer.is_sharded or self.trainer.config.precision == "float32":
            # else layers are gathered in bfloat16: no comparison with the average in float32
            metrics = grid_metrics(self._grid(model=self.trainer.model), "val/raw_")
        for grid in others:
            prefix = f"val/{SETTING_PREFIX[grid.setting]}"
            metrics |= grid_metrics(grid, prefix) | gain_metrics(grid, alone, prefix)
        if others:
            batch_size = self.request.config.evaluation.batch_size
            metrics["val/copy_accuracy"] = copy_accuracy(self.samples, batch_size=batch_size)
        return _finite(metrics | self._change())

    @functools.cached_property
    def grids(self) -> tuple[LossGrid, ...]:
        """The averaged weights at the end of the stage in every setting."""
        if self.samples is None:
            return ()
        alone, *others = settings_of(self.samples)
        # a stage that was killed after its last step has not measured yet
        return (self._newest or self._grid(alone), *map(self._grid, others))

    def curve(self) -> tuple[tuple[float, float], ...]:
        """Return (t, loss): what the entropy clock of a sampler follows."""
        if self.samples is None:
            return ()
        known = dict(zip(self.grids[0].timesteps, self.grids[0].loss_by_time, strict=True))
        missing = [t for t in _CURVE_TIMES if t not in known]
        grid = self._grid(timesteps=missing)
        known |= zip(grid.timesteps, grid.loss_by_time, strict=True)
        return tuple((t, known[t]) for t in _CURVE_TIMES)

    def tell_share(self, whole_s: float) -> None:
        """Say what part of the time of the stage validation took, and what to do if it is much."""
        share, stage = self.spent_s / whole_s, self.request.stage
        logger.info("stage %s: validation took %.1f of %.1f s", stage, self.spent_s, whole_s)
        if share > _VALIDATION_SHARE and whole_s > _SHORT_S:
            logger.warning(
                "stage %s: validation took %.0f%% of the time, more than %.0f%%; raise "
                "stages.%s.validate_every, or lower evaluation.max_samples to less than %d",
                stage,
                100 * share,
                100 * _VALIDATION_SHARE,
                stage,
                min(_VALIDATION_SAMPLES, self.request.config.evaluation.max_samples),
            )

    def _change(self) -> dict[str, float]:
        """Return what changed since the stage before, if that had the same samples."""
        parent, config = self.request.init_from, self.trainer.config
        if parent is None or config.init_from is not None:
            return {}
        before: StageConfig = getattr(self.request.config.stages, parent.stage)
        is_same = before.modality == config.modality
        return change_metrics(self.grids, parent.grids, "val/") if is_same else {}

    def _grid(
        self,
        setting: GridSetting = "synchronous",
        *,
        model: UrsaTransformer | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> LossGrid:
        assert self.samples is not None
        began = time.perf_counter()
        evaluation = self.request.config.evaluation
        averaged = self.trainer.averaged_model() if model is None else contextlib.nullcontext(model)
        with averaged as network:
            grid = measure_grid(
                network,
                self.trainer.path,
                self.trainer.text_tokenizer,
                self.samples,
                timesteps=timesteps or evaluation.timesteps,
                batch_size=evaluation.batch_size,
                max_prompt_length=self.trainer.max_prompt_length,
                seed=address_seed(self.request.config.seed, "validation"),
                setting=setting,
                # float32 takes ten times as long on a GPU, on a CPU hardly longer
                precision=self.trainer.precision
                if self.trainer.device.type == "cuda"
                else torch.float32,
            )
        self.spent_s += time.perf_counter() - began
        return grid


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what a record can hold: finite numbers alone."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _local_worker(
    rank: int,
    world_size: int,
    port: int,
    request: StageRequest,
    execution: Execution,
    on_metrics: OnMetrics | None,
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        CPU_BACKEND if execution.device == "cpu" else GPU_BACKEND,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
    )
    try:
        train_stage(request, execution=execution, on_metrics=on_metrics)
    finally:
        dist.destroy_process_group()


def _stage_uri(request: StageRequest) -> str:
    return storage.join(
        request.output_uri, "checkpoints", request.stage, stage_fingerprint(request)[:32]
    )


def _manifest_uri(request: StageRequest) -> str:
    return storage.join(_stage_uri(request), "manifest.json")
