"""One training stage as a step: from token data sets and a parent to a committed checkpoint."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, CheckpointRef, StageRequest, TokenizerRef
from ursa.config import StageConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples
from ursa.errors import CheckpointError, TrainingError
from ursa.model.transformer import TransformerConfig, UrsaTransformer, build_transformer
from ursa.tokenizers.text import TextTokenizer, load_text_tokenizer
from ursa.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    restore_state,
    save_checkpoint,
    training_state,
)
from ursa.training.distributed import Group, current_group
from ursa.training.schedule import load_codes, path_over
from ursa.training.trainer import OnMetrics, Trainer, loss_by_time

logger = logging.getLogger(__name__)

_VALIDATION_SAMPLES = 32
_CURVE_TIMES = (*(i / 10 for i in range(10)), 0.95, 0.98, 0.99, 0.995, 0.999)
"""Close where the loss falls most, up to the end of what training draws."""


def stage_fingerprint(request: StageRequest) -> str:
    """Return what decides the stage: its settings, data, parent, tokenizers and the model.

    Args:
        request: The stage.

    Returns:
        sha256, 64 hexadecimal digits.
    """
    config = request.config
    return fingerprint(
        SCHEMA_VERSION,
        request.stage,
        config.seed,
        getattr(config.stages, request.stage),
        config.model,
        config.path,
        config.text_tokenizer,
        request.datasets.fingerprint,
        request.visual_tokenizer.fingerprint,
        request.text_tokenizer.fingerprint,
        request.init_from.fingerprint if request.init_from else None,
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


def train_stage(request: StageRequest, *, on_metrics: OnMetrics | None = None) -> CheckpointRef:
    """Train one stage, or return its committed result.

    Every rank of an initialised process group calls it with the same request. It goes on from the
    newest whole checkpoint of the same stage and is then equal to an uninterrupted run to the bit.
    SIGTERM saves a checkpoint and ends the process with status 143.

    Args:
        request: Everything that decides the stage.
        on_metrics: Called on rank 0 with (step, metrics), steps counted from 1.

    Returns:
        The committed checkpoint; its metrics are those of the last step.

    Raises:
        TrainingError: If the loss is not finite, there is no data, or a checkpoint is damaged.
        ConfigError: If the batch cannot be divided evenly among the ranks.
        StorageError: If the store refuses or does not answer.
        SystemExit: With status 143, after SIGTERM.
    """
    group = current_group()
    done = find_stage(request)
    if done is not None:
        return done
    config: StageConfig = getattr(request.config.stages, request.stage)
    trainer = _build_trainer(request, group)
    resumed = latest_checkpoint(_stage_uri(request), fingerprint=stage_fingerprint(request))
    uri, first = "", 0
    metrics: dict[str, float] = {}
    if resumed is not None:
        uri, marker, state = resumed
        restore_state(state, trainer.model, trainer.average, trainer.optimizer)
        first, metrics = marker.step, marker.metrics
        logger.info("stage %s goes on from step %d", request.stage, first)
        del state  # as large as model, average and moments together
    del resumed
    validation = _Validation(request, trainer)
    with _Termination() as termination:
        for step in range(first, config.max_steps):
            metrics = trainer.step(step)
            if group.is_main:
                count = step + 1
                validated = _is_due(count, config.validate_every, config)
                if validated:
                    metrics |= validation.measure()
                logged = validated or step == 0 or _is_due(count, config.log_every, config)
                if on_metrics is not None and logged:
                    on_metrics(count, metrics)
                if termination.requested or _is_due(count, config.checkpoint_every, config):
                    uri = _save(trainer, request, count, metrics)
            if termination.requested:
                logger.warning("SIGTERM: saved step %d of stage %s", step + 1, request.stage)
                raise SystemExit(143)
    curve = validation.curve() if group.is_main else ()
    result = CheckpointRef(
        uri=uri,
        stage=request.stage,
        step=config.max_steps,
        num_samples_seen=config.max_steps * config.global_batch_size,
        metrics={key: value for key, value in metrics.items() if not key.endswith("_s")},
        loss_curve=curve,
        fingerprint=stage_fingerprint(request),
        parent_uri=request.init_from.uri if request.init_from else None,
    )
    if group.is_main:
        result = storage.commit_record(_manifest_uri(request), result)
    group.barrier()
    return result


def launch_local(
    request: StageRequest, *, num_workers: int = 1, on_metrics: OnMetrics | None = None
) -> CheckpointRef:
    """Run `train_stage` in gloo processes of this machine; one worker runs in this process.

    Args:
        request: Everything that decides the stage.
        num_workers: Number of processes.
        on_metrics: Called in rank 0's process; with several workers it must be picklable.

    Returns:
        The committed checkpoint.

    Raises:
        TrainingError: If a worker failed.
    """
    if num_workers == 1:
        return train_stage(request, on_metrics=on_metrics)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        spawn(_local_worker, (num_workers, port, request, on_metrics), nprocs=num_workers)
    except (ProcessRaisedException, ProcessExitedException) as error:
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


def _build_trainer(request: StageRequest, group: Group) -> Trainer:
    stage = getattr(request.config.stages, request.stage)
    codes, levels = load_codes(request.visual_tokenizer)
    path = path_over(request, codes, levels)
    model = build_transformer(transformer_config(request), seed=request.config.seed, codebook=codes)
    if request.init_from is not None:
        # a stage starts from the average of the one before: less noise than the last weights
        _take_average(model, request.init_from)
    return Trainer(
        stage=request.stage,
        config=stage,
        seed=request.config.seed,
        model=model,
        path=path,
        text_tokenizer=load_text(request.text_tokenizer),
        samples=TokenSamples(request.datasets.get(stage.modality, "train")),
        max_prompt_length=request.config.text_tokenizer.max_prompt_length,
        group=group,
    )


def _take_average(model: UrsaTransformer, checkpoint: CheckpointRef) -> None:
    """Load the averaged weights of a checkpoint into a network."""
    _, state = load_checkpoint(checkpoint.uri)
    weights = {k.removeprefix("ema."): v for k, v in state.items() if k[:4] == "ema."}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.uri} does not fit the model of this run; give the model settings and "
            f"tokenizers that it was trained with: {error}"
        ) from error


def _is_due(count: int, every: int, config: StageConfig) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return count % every == 0 or count == config.max_steps


def _save(trainer: Trainer, request: StageRequest, count: int, metrics: Mapping[str, float]) -> str:
    return save_checkpoint(
        training_state(trainer.model, trainer.average, trainer.optimizer),
        _stage_uri(request),
        step=count,
        num_samples_seen=count * trainer.config.global_batch_size,
        fingerprint=stage_fingerprint(request),
        keep=trainer.config.keep_checkpoints,
        metrics=metrics,
    )


class _Validation:
    """Held-out loss by t of the averaged weights; absent where nothing was held out."""

    def __init__(self, request: StageRequest, trainer: Trainer) -> None:
        stage = trainer.config
        dataset = request.datasets.get(stage.modality, "validation")
        self.samples = TokenSamples(dataset) if dataset.num_samples else None
        self.request = request
        self.trainer = trainer

    def measure(self) -> dict[str, float]:
        if self.samples is None:
            return {}
        losses = self._losses(self.request.config.evaluation.timesteps)
        named = {f"val/loss_t{t:g}": loss for t, loss in losses.items()}
        return named | {"val/loss": sum(losses.values()) / len(losses)}

    def curve(self) -> tuple[tuple[float, float], ...]:
        """Return (t, loss): what the entropy clock of a sampler follows."""
        return tuple(self._losses(_CURVE_TIMES).items()) if self.samples is not None else ()

    def _losses(self, timesteps: Sequence[float]) -> dict[float, float]:
        assert self.samples is not None
        evaluation = self.request.config.evaluation
        average = self.trainer.average.module
        assert isinstance(average, UrsaTransformer)
        measured = loss_by_time(
            average,
            self.trainer.path,
            self.trainer.text_tokenizer,
            self.samples,
            timesteps=timesteps,
            batch_size=evaluation.batch_size,
            max_samples=min(_VALIDATION_SAMPLES, evaluation.max_samples),
            max_prompt_length=self.trainer.max_prompt_length,
            seed=address_seed(self.request.config.seed, "validation"),
        )
        return {t: loss for t, (loss, _) in measured.items()}


class _Termination:
    """Notes a SIGTERM so that the loop can save first; the old handler is put back at the end."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Termination":
        if self._active:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True


def _local_worker(
    rank: int, world_size: int, port: int, request: StageRequest, on_metrics: OnMetrics | None
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    try:
        train_stage(request, on_metrics=on_metrics)
    finally:
        dist.destroy_process_group()


def _stage_uri(request: StageRequest) -> str:
    return storage.join(
        request.output_uri, "checkpoints", request.stage, stage_fingerprint(request)[:32]
    )


def _manifest_uri(request: StageRequest) -> str:
    return storage.join(_stage_uri(request), "manifest.json")
