"""The training loop: one for all stages, which differ in configuration alone.

Dimensions: B = local batch, T, H, W = latent frames, rows, columns, N = T*H*W, V = codes.

References:
    URSA, arXiv 2510.24717, section 3.3 (asynchronous timesteps) and 4 (recipe).
"""

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ursa.config import StageConfig
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenBatch
from ursa.data.mixed_loader import MixedLoader
from ursa.diffusion.loss import linear_posterior_loss
from ursa.diffusion.path import ProbabilityPath
from ursa.diffusion.timesteps import training_times
from ursa.errors import NonFiniteLossError
from ursa.model.adapters import dropouts
from ursa.model.size import Clip
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TextTokenizer, motion_prompt
from ursa.training.blocks import checkpoint_activations, compile_layers
from ursa.training.distributed import (
    Group,
    drop_gathered,
    local_device,
    shard_model,
    whole,
)
from ursa.training.execution import DEFAULT_EXECUTION, Execution
from ursa.training.optim import build_average, build_optimizer, learning_rate, trained_part
from ursa.training.plan import training_flops

logger = logging.getLogger(__name__)

OnMetrics = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """What one step reads: everything random in it is addressed by (seed, stage, step, sample).

    Attributes:
        text_ids: Prompts, shape (B, L), int64.
        x_1: Clean codes, shape (B, T, H, W), int64.
        x_t: Noisy codes, shape (B, T, H, W), int64.
        seeds: One a sample, that its draws are made of.
    """

    text_ids: Tensor
    x_1: Tensor
    x_t: Tensor
    seeds: tuple[int, ...]


class Trainer:
    """Model, average, optimizer and data of one stage."""

    def __init__(  # noqa: PLR0913  (the parts of a stage)
        self,
        *,
        stage: str,
        config: StageConfig,
        seed: int,
        model: UrsaTransformer,
        path: ProbabilityPath,
        text_tokenizer: TextTokenizer,
        loader: MixedLoader,
        max_prompt_length: int,
        group: Group,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> None:
        """Build optimizer and average around the model; nothing is read or written here.

        With strategy fsdp all ranks call this.

        Args:
            stage: Name of the stage, part of the address of every draw.
            config: Its settings.
            seed: Of the run.
            model: The network; it is moved to the device of `execution`, and its weights change, or
                those of its adapters.
            path: The probability path.
            text_tokenizer: Turns prompts into ids.
            loader: Training samples; `close` closes it too.
            max_prompt_length: Ids a prompt.
            group: This process among all.
            execution: How it is computed.

        Raises:
            ConfigError: If there is no such device, or layers are to be compiled and that does not
                work on this machine.
        """
        self.device = local_device(execution.device)
        model.to(self.device)
        self.stage = stage
        self.config = config
        self.seed = seed
        self.model = model
        self.path = path
        self.text_tokenizer = text_tokenizer
        self.loader = loader
        self.max_prompt_length = max_prompt_length
        self.group = group
        self._noising = ThreadPoolExecutor(1, thread_name_prefix="noising")
        self._ahead: dict[int, Future[NoisyBatch]] = {}
        self.is_sharded = execution.strategy == "fsdp" and group.world_size > 1
        self.precision = getattr(torch, config.precision)
        self._dropouts = dropouts(model)
        is_whole = trained_part(model) is model
        if is_whole:  # a copy, so before the layers are changed
            self.average: AveragedModel = build_average(model, config)
        checkpoint_activations(model, execution.activation_checkpointing)
        if execution.compile_layers:
            compile_layers(model)
        if self.is_sharded:
            # validation computes in float32, with adapters on this network too
            shard_model(model, precision=self.precision if is_whole else torch.float32)
            if is_whole:
                average = self.average.module
                assert isinstance(average, UrsaTransformer)
                shard_model(average)
        # last: sharding makes new parameters
        self.trained = trained_part(model)
        if not is_whole:
            self.average = build_average(self.trained, config)
        self.optimizer = build_optimizer(self.trained, config)

    def noisy_batch(self, step: int) -> NoisyBatch:
        """Return this rank's part of the batch of a step, a pure function of the step.

        Args:
            step: Step number from 0.

        Raises:
            ConfigError: If the batch cannot be divided evenly among the ranks.
            ShardFormatError: If a shard is missing, damaged or of another schema.
            StorageError: If the store refuses or does not answer.
        """
        size = self.loader.batch_size(step)
        share = self.group.share(size)
        places = range(size)[share]
        return make_noisy_batch(
            self.loader.batch(step, share),
            self.path,
            self.config,
            self.text_tokenizer,
            max_prompt_length=self.max_prompt_length,
            num_main_tokens=self.loader.num_main_tokens,
            seeds=[address_seed(self.seed, self.stage, step, place) for place in places],
        )

    def _loaded(self, step: int) -> NoisyBatch:
        """Return the batch of a step; that of the next is made while this one is learned from."""
        ahead = self._ahead
        batch = ahead.pop(step).result() if step in ahead else self.noisy_batch(step)
        if step + 1 < self.config.max_steps:
            ahead[step + 1] = self._noising.submit(self.noisy_batch, step + 1)
        return batch

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[UrsaTransformer]:
        """Yield the network with the averaged weights; with a sharded one all ranks call this.

        Where a part is trained it is the network itself, with the average in the place of that
        part; the weights come back to the bit.

        Yields:
            The network; its weights must not be changed.
        """
        if self.trained is self.model:
            average = self.average.module
            assert isinstance(average, UrsaTransformer)
            yield average
            return
        kept = [parameter.detach().clone() for parameter in self.trained.parameters()]
        try:
            self._put(self.average.module.parameters())
            yield self.model
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        """Replace what is trained."""
        drop_gathered(self.model)  # what was gathered before holds the old values
        for parameter, value in zip(self.trained.parameters(), values, strict=True):
            parameter.copy_(value)

    def close(self) -> None:
        """Stop making and reading batches ahead; what is being read is waited for."""
        self.loader.close()
        self._noising.shutdown(cancel_futures=True)

    def step(self, step: int) -> dict[str, float]:
        """Do one optimizer step.

        Args:
            step: Step number from 0.

        Returns:
            `train/loss` in nats and `train/accuracy` in [0, 1], means over all ranks,
            `train/grad_norm` before clipping, `train/lr`, `train/step_s` in seconds and the part of
            it in which this rank waited for its batch, `train/data_wait_s`, `train/tokens_per_s`,
            `train/model_flops_per_s` and `train/samples_seen` over all ranks, and
            `train/peak_memory_bytes` of this rank since its process began.

        Raises:
            NonFiniteLossError: On a NaN or infinite loss or gradient on any rank, on all of them
                and before the update: nothing has changed, the next step can be done.
            ConfigError: If the batch cannot be divided evenly among the ranks.
            ShardFormatError: If a shard is missing, damaged or of another schema.
            StorageError: If the store refuses or does not answer.
        """
        started = time.perf_counter()
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._loaded(step)
        waited = time.perf_counter() - started
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._add_gradients(batch)
        if not self.is_sharded:  # else the backward pass has done it
            self.group.average_gradients(self.trained)
        norm = whole(nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.max_grad_norm))
        loss, accuracy = self.group.mean(sums)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"stage {self.stage}, step {step}: loss {float(loss)}, gradient norm {float(norm)}"
                "; the weights were not updated; lower stages."
                f"{self.stage}.learning_rate {self.config.learning_rate:g}"
            )
        self.optimizer.step()
        self.average.update_parameters(self.trained)
        seconds = time.perf_counter() - started
        tokens = batch.x_1.numel() * self.group.world_size
        return {
            "train/loss": float(loss),
            "train/accuracy": float(accuracy),
            "train/grad_norm": float(norm),
            "train/lr": rate,
            "train/step_s": seconds,
            "train/data_wait_s": waited,
            "train/tokens_per_s": tokens / seconds,
            "train/model_flops_per_s": self._flops(batch) / seconds,
            "train/peak_memory_bytes": float(peak_memory_bytes()),
            "train/samples_seen": float(self.loader.samples_seen(step + 1)),
        }

    def _flops(self, batch: NoisyBatch) -> int:
        """Return the operations that a step needs, over all ranks; what is done twice counts once.

        Divided by the peak of the device they are its model FLOPs utilisation (PaLM, arXiv
        2204.02311, appendix B).
        """
        size, frames, rows, columns = batch.x_1.shape
        clip = Clip((frames, rows, columns), batch.text_ids.shape[1])
        each = sum(training_flops(self.model.config, clip, self.config.lora))
        return each * size * self.group.world_size

    def _add_gradients(self, batch: NoisyBatch) -> Tensor:
        """Add up the gradients of the batch, part by part; return mean loss and accuracy."""
        parts = [
            each.chunk(self.config.gradient_accumulation_steps)
            for each in (batch.text_ids, batch.x_t, batch.x_1.flatten(1), torch.tensor(batch.seeds))
        ]
        means = []
        for *part, seeds in zip(*parts, strict=True):
            text_ids, x_t, x_1 = (each.to(self.device) for each in part)
            self._seed_dropouts(seeds.tolist())
            # the last part may be smaller than the others
            weight = len(x_1) / len(batch.x_1)
            with torch.autocast(
                x_t.device.type, self.precision, enabled=self.precision != torch.float32
            ):
                hidden = self.model.hidden_states(text_ids, x_t)
            # the head multiplies in the type of the states; softmax and loss are float32
            result = linear_posterior_loss(
                hidden.to(self.precision), self.model.lm_head.weight, x_1
            )
            (result.loss * weight).backward()
            means.append(torch.stack([result.loss.detach(), result.accuracy]) * weight)
        return torch.stack(means).sum(0)

    def _seed_dropouts(self, seeds: Sequence[int]) -> None:
        """Let the masks of the next part follow from (seed, stage, step, sample, place)."""
        for name, dropout in self._dropouts.items():
            dropout.seeds = [address_seed(seed, "dropout", name) for seed in seeds]


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held at once.

    Returns:
        Bytes that torch has allocated on the GPU, if it uses one, else resident bytes.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage, which on Linux still counts what the parent held before exec
        kilobytes = status.read_text("utf-8").partition("VmHWM:")[2].split(maxsplit=1)[0]
        return 1024 * int(kilobytes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_noisy_batch(
    batch: TokenBatch,
    path: ProbabilityPath,
    config: StageConfig,
    text_tokenizer: TextTokenizer,
    *,
    max_prompt_length: int,
    num_main_tokens: int,
    seeds: Sequence[int],
) -> NoisyBatch:
    """Draw prompts, times and noise, each sample from its own seed.

    Args:
        batch: Clean samples.
        path: The probability path.
        config: The stage: timesteps, shift, prompt dropout, motion prefix.
        text_tokenizer: Turns the prompt into ids.
        max_prompt_length: Ids a prompt.
        num_main_tokens: Tokens of a sample of the main size, for which the shift is given.
        seeds: One seed a sample.

    Returns:
        Prompt ids, clean and noisy codes.
    """
    num_frames, rows, columns = batch.visual_ids.shape[1:]
    shift = config.timestep_shift
    if config.scale_shift:
        shift *= math.sqrt(num_frames * rows * columns / num_main_tokens)
    prompts, times, noises = [], [], []
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        drop, prefix, together = torch.rand(3, generator=generator).tolist()
        uniform = torch.rand(num_frames, generator=generator)
        noise = torch.rand(num_frames, rows, columns, generator=generator, dtype=torch.float64)
        noises.append(noise)
        if config.timesteps == "synchronous" or together < config.synchronous_fraction:
            uniform = uniform[:1].expand(num_frames)
        times.append(training_times(uniform, shift))
        motion = batch.motion_px_per_s[index]
        prompt = motion_prompt(
            batch.captions[index], motion if prefix < config.motion_prefix_probability else None
        )
        prompts.append("" if drop < config.prompt_dropout else prompt)
    t = torch.stack(times)[:, :, None, None]
    x_t = path.sample(batch.visual_ids, t, uniform=torch.stack(noises))
    text_ids = text_tokenizer.encode(prompts, max_length=max_prompt_length)
    return NoisyBatch(text_ids=text_ids, x_1=batch.visual_ids, x_t=x_t, seeds=tuple(seeds))
