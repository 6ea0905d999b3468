"""UrsaPipeline: prompt, and frames if there are any, to frames.

All modes are one: some latent frames are given, and every latent frame has its own clock
(`ursa.generation.conditions`).

Dimensions: B = videos, F = frames, T = latent frames, H, W = pixels, h, w = rows and columns of
codes, V = codes, L = ids a prompt.

References:
    URSA, arXiv 2510.24717, section 3.3 and algorithm 2. The names of the call are those of the
    official pipeline and of diffusers.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ursa.diffusion.clocks import checked_times, distance_by_time, equal_drops
from ursa.diffusion.draws import check_ids
from ursa.diffusion.path import MetricPath
from ursa.diffusion.timesteps import inference_times
from ursa.errors import ConfigError
from ursa.generation.arguments import (
    check_output,
    check_sampler,
    check_tensor,
    check_whole_numbers,
    checked_latent_shape,
    parse_size,
    per_video,
    refuse_unknown_arguments,
)
from ursa.generation.conditions import (
    Clip,
    Conditions,
    Picture,
    encode_clip,
    encode_last,
    encode_picture,
    given_codes,
    no_conditions,
    share,
)
from ursa.generation.files import (
    Parts,
    SampleDefaults,
    SchedulerConfig,
    find_directory,
    read_directory,
    write_directory,
)
from ursa.generation.limits import check_memory, check_texts
from ursa.generation.sampler import (
    DrawOrder,
    Draws,
    Generators,
    OnStep,
    Sampling,
    Solver,
    sample,
)
from ursa.model.size import Clip as LatentClip
from ursa.model.size import latent_shape
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TextTokenizer, motion_prompt
from ursa.tokenizers.visual import AutoencoderTokenizer

_Value = TypeVar("_Value")
Clock = Literal["official", "linear", "entropy"]
OutputType = Literal["pil", "np", "pt", "latent"]
OnStepEnd = Callable[["UrsaPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class UrsaOutput(NamedTuple):
    """Generated videos; a tuple of one, so that `return_dict=False` has nothing to change.

    Attributes:
        frames: "pil": a list of images if one frame was asked for, else as "np"; "np": uint8
            (B, F, H, W, 3); "pt": pixels in about [-1, 1], float32 (B, 3, F, H, W); "latent": codes
            int64 (B, T, h, w).
    """

    frames: Any


class UrsaPipeline:
    """A transformer, its path and its tokenizers.

    Attributes:
        defaults: What a call takes where it names nothing.
        interrupt: Set it to True to stop after the step: in `callback_on_step_end`, on the pipe
            that it gets, for that call alone.
    """

    def __init__(
        self,
        *,
        transformer: UrsaTransformer,
        scheduler: SchedulerConfig,
        visual_tokenizer: AutoencoderTokenizer,
        text_tokenizer: TextTokenizer,
        defaults: SampleDefaults,
        codebook: Tensor | None = None,
    ) -> None:
        """Take the parts over for inference.

        Args:
            transformer: The network.
            scheduler: The path's schedule.
            visual_tokenizer: Frames to codes.
            text_tokenizer: Prompts to ids.
            defaults: What a call takes where it names nothing.
            codebook: What the path measures distances on, shape (V, D); None takes the visual
                tokenizer's.

        Raises:
            ConfigError: If the schedule or the codebook is refused.
        """
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        self.visual_tokenizer = visual_tokenizer
        self.text_tokenizer = text_tokenizer
        self.defaults = defaults
        self.codebook = visual_tokenizer.codebook if codebook is None else codebook
        self.path = scheduler.path(self.codebook, visual_tokenizer.levels).to(self.device)
        self._distance_by_time: tuple[list[float], list[float]] | None = None
        self.interrupt = False
        self._progress: dict[str, Any] = {"disable": None}  # shown on terminals only

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,  # noqa: ARG003
    ) -> "UrsaPipeline":
        """Read a model directory, or a model of the hub, in the official layout or ours.

        Args:
            directory: A directory, or a name such as "BAAI/URSA-1.7B-FSQ320".
            torch_dtype: Type of the weights; None keeps the stored one. The path is computed in
                float32 whatever it is.
            device: Where to run.
            trust_remote_code: Accepted as the official examples have it; no code of a directory is
                ever run.

        Returns:
            The pipeline, on `device`.

        Raises:
            ConfigError: If it is no such directory, or its parts do not fit together.
        """
        parts = read_directory(find_directory(directory), dtype=torch_dtype)
        pipeline = cls(
            transformer=parts.transformer,
            scheduler=parts.scheduler,
            visual_tokenizer=parts.visual_tokenizer,
            text_tokenizer=parts.text_tokenizer,
            defaults=parts.defaults,
            codebook=parts.codebook,
        )
        return pipeline.to(device)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        codebook_file: bool = True,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the official layout, which `from_pretrained` reads again bit for bit.

        The official code reads it too if the networks are its own: a visual tokenizer of its
        classes, and a transformer with heads of 128. A model that was in the directory is replaced.

        Args:
            directory: Made if missing.
            max_shard_size: Largest file of the transformer's weights, bytes or such as "5GB".
            safe_serialization: As diffusers has it; weights are safetensors, False is refused.
            codebook_file: Whether to write scheduler/scheduler_model.pth, which the official code
                needs and ours does not. Without it the directory holds no pickle.

        Raises:
            ConfigError: If `safe_serialization` is False or `max_shard_size` no positive size.
        """
        parts = Parts(
            transformer=self.transformer,
            scheduler=self.scheduler,
            codebook=self.codebook,
            visual_tokenizer=self.visual_tokenizer,
            text_tokenizer=self.text_tokenizer,
            defaults=self.defaults,
        )
        if not safe_serialization:
            raise ConfigError("weights are written as safetensors; leave safe_serialization out")
        write_directory(
            parts,
            Path(directory),
            codebook_file=codebook_file,
            max_shard_bytes=parse_size(max_shard_size),
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer's weights are."""
        return self.transformer.lm_head.weight.dtype

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move and cast both networks in place: `pipe.to("cuda", torch.bfloat16)`.

        Args:
            *targets: Devices and dtypes.
            device: Where to run; None leaves it.
            dtype: Type of the weights; None leaves it. A configured `decoder_dtype` is kept.

        Returns:
            This pipeline.
        """
        for target in (*targets, device, dtype):
            if target is None:
                continue
            if isinstance(target, torch.dtype):
                self.transformer.to(target)
                self.visual_tokenizer.to(dtype=target)
            else:
                self.transformer.to(target)
                self.visual_tokenizer.to(device=target)
        self.path = self.path.to(self.device)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set how the bar over the steps looks.

        Args:
            **options: Options of tqdm; `disable=True` shows no bar.
        """
        self._progress = {"disable": None, **options}

    @refuse_unknown_arguments
    @torch.no_grad()
    def __call__(  # noqa: PLR0913  (the names of the official call and of diffusers)
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        last_image: Picture | None = None,
        video: Clip | Sequence[Clip] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_trunc: float | None = None,
        flow_shift: float | None = None,
        clock: Clock | Sequence[float] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        motion_score: float | None = None,
        num_videos_per_prompt: int = 1,
        num_images_per_prompt: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        latents_shape: Sequence[int] | None = None,
        cond_latents: Tensor | None = None,
        cond_indices: Sequence[int] | None = None,
        cond_noise_scale: float = 0.0,
        hold_given: bool = True,
        prompt_ids: Tensor | None = None,
        negative_prompt_ids: Tensor | None = None,
        max_prompt_length: int | None = None,
        max_sequence_length: int | None = None,
        vae_batch_size: int = 1,
        solver: Solver | None = None,
        draw_order: DrawOrder = "per_token",
        output_type: OutputType = "pil",
        return_dict: bool = True,  # noqa: ARG002
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> UrsaOutput:
        """Generate videos, or images if one frame is asked for.

        What is not named comes from the model (`defaults`). Nothing that is passed is changed; a
        generator moves on, as in torch.

        Args:
            prompt: One text or several.
            negative_prompt: What the unconditional branch reads: one text, or one a prompt.
            image: First frame, PIL or uint8 (H, W, 3), one or one a prompt.
            last_image: Last frame; with `image` the clip goes from one to the other.
            video: First frames, uint8 (F', H, W, 3) or a list of images, one clip or one a prompt.
            height: Pixels, divisible by the visual tokenizer's stride.
            width: Pixels, likewise.
            num_frames: 1 + 4k; 1 is an image.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Classifier-free guidance; up to 1 is off.
            guidance_trunc: From this t on guidance is off.
            flow_shift: Timestep shift of the official clock, 1 is none.
            clock: When steps start. "official": even times, shifted; "linear": equal falls of the
                mean distance from x_1; "entropy": equal falls of the held-out loss; or the times
                themselves, rising from 0 to below 1, as many as steps.
            temperature: The guided logits are divided by it before x_1 is drawn; 1 is the model's
                own law, less gives fewer wrong codes and less variety, 0 the likeliest code.
            top_k: Draw among the k likeliest codes.
            top_p: Draw among the fewest codes whose mass reaches p.
            motion_score: Asked motion in px/s at 256 px width: writes `motion=9.0, ` before every
                prompt; None writes nothing.
            num_videos_per_prompt: Videos of every prompt.
            num_images_per_prompt: The official name of it.
            generator: One for all, or one a video, so that a video does not depend on its
                neighbours in the batch.
            latents: Codes to start from instead of noise, shape (B, T, h, w).
            latents_shape: (T, h, w) or (h, w) instead of the sizes in pixels.
            cond_latents: Codes of given frames instead of pixels, shape (1, prompts or videos;
                T', h, w).
            cond_indices: Which of their latent frames are given; None is all of them.
            cond_noise_scale: Given frames are noised to t = 1 - scale and take part from there on.
            hold_given: Whether given frames wait until their time has come: with scale 0 they are
                kept to the bit. False is the official behaviour: they only start there.
            prompt_ids: Ids instead of prompts, left-padded, shape (prompts, L).
            negative_prompt_ids: Ids of the negative prompts, shape (1 or prompts, L).
            max_prompt_length: Ids a prompt is padded or cut to.
            max_sequence_length: diffusers' name of it.
            vae_batch_size: Videos decoded at once.
            solver: "exact" carries every token by the jump process of its x_1 without an error of
                time, so that few steps do; "euler" is the step of the paper; "euler_beta" holds the
                rates over a step as that does, but in the path's own time.
            draw_order: "official" draws in the order of the official code, along the path of the
                model: on a CPU the same seed gives the same tokens. It takes one generator, Euler
                steps and no temperature, top_k or top_p.
            output_type: See `UrsaOutput`.
            return_dict: Accepted as diffusers has it: the output is a tuple of the frames anyway.
            callback_on_step_end: Called as callback(pipe, step, t, {"latents": codes}) after every
                step; what it returns under "latents" goes on instead. Setting `interrupt` of the
                pipe that it gets stops this call.
            callback_on_step_end_tensor_inputs: What it gets; there is "latents" alone.

        Returns:
            The videos, prompt by prompt.

        Raises:
            ConfigError: If an argument does not fit; sizes name the nearest that do.
            DataError: If a given clip does not fit the visual tokenizer.
            TypeError: If a name is unknown; it names the nearest.
        """
        check_whole_numbers(
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            top_k=top_k,
        )
        check_output(
            output_type=output_type,
            vae_batch_size=vae_batch_size,
            max_prompt_length=max_prompt_length,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        asked = self.defaults
        shift = _or(_or(flow_shift, asked.flow_shift), self.scheduler.shift)
        given_times = None if clock is None or isinstance(clock, str) else list(clock)
        num_steps = _or(num_inference_steps, len(given_times or ()) or asked.num_inference_steps)
        sampling = Sampling(
            times=(),
            scale=_or(guidance_scale, asked.guidance_scale),
            trunc=_or(guidance_trunc, asked.guidance_trunc),
            temperature=_or(temperature, 1.0 if draw_order == "official" else asked.temperature),
            top_k=top_k,
            top_p=top_p,
            draw_order=draw_order,
            solver=_or(solver, "euler" if draw_order == "official" else asked.solver),
        )
        check_sampler(
            num_inference_steps=num_steps,
            guidance_scale=sampling.scale,
            flow_shift=shift,
            temperature=sampling.temperature,
            cond_noise_scale=cond_noise_scale,
            solver=sampling.solver,
            draw_order=sampling.draw_order,
        )
        is_official = draw_order == "official"
        if is_official and (
            top_k is not None
            or top_p is not None
            or sampling.temperature != 1
            or sampling.solver != "euler"
        ):
            raise ConfigError(
                'draw_order "official" draws as the official code does: leave top_k and top_p out, '
                f'temperature at 1 and solver at "euler"; got top_k={top_k}, top_p={top_p}, '
                f"temperature={sampling.temperature}, solver={sampling.solver}"
            )
        if float(torch.tensor(1 - cond_noise_scale, dtype=torch.float32)) == 1:
            cond_noise_scale = 0.0  # less than float32 can tell from none
        grid = _or(clock, "official" if is_official else asked.clock)
        times = self._times(grid, num_steps, shift)
        sampling = replace(sampling, times=tuple(times.tolist()))
        copies = _or(num_images_per_prompt, num_videos_per_prompt)
        tokenizer = self.visual_tokenizer
        if latents_shape is None:
            size = _or(height, asked.height), _or(width, asked.width)
            shape = latent_shape(
                _or(num_frames, asked.num_frames),
                *size,
                temporal_stride=tokenizer.temporal_stride,
                spatial_stride=tokenizer.spatial_stride,
            )
        else:
            shape = checked_latent_shape(latents_shape)
            size = shape[1] * tokenizer.spatial_stride, shape[2] * tokenizer.spatial_stride
        length = _or(_or(max_prompt_length, max_sequence_length), asked.max_prompt_length)
        if prompt_ids is not None:
            num_prompts, length = len(prompt_ids), prompt_ids.shape[-1]
        else:
            num_prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
        check_memory(
            self.transformer.config,
            LatentClip(shape, length),
            num_videos=num_prompts * max(copies, 1),
            frame_px=(1 + (shape[0] - 1) * tokenizer.temporal_stride, *size),
            is_guided=sampling.scale > 1,
            bytes_per_value=self.dtype.itemsize,
            device=self.device,
        )
        text_ids, negative_ids = self._prompts(
            prompt,
            negative_prompt,
            prompt_ids,
            negative_prompt_ids,
            motion_score=motion_score,
            length=length,
            copies=copies,
        )
        conditions = self._conditions(
            image,
            last_image,
            video,
            cond_latents,
            cond_indices,
            size,
            shape,
            (len(text_ids) // copies, len(text_ids)),
        )
        draws = Draws(generator, len(text_ids), shape, sampling.draw_order)
        start = self._start(latents, conditions, cond_noise_scale, shape, draws)
        begins = torch.zeros(shape[0])
        if hold_given:
            begins = torch.where(conditions.given, 1 - cond_noise_scale, begins)
        codes = sample(
            self.transformer,
            self.path,
            start,
            begins=begins,
            text_ids=text_ids,
            negative_ids=negative_ids,
            sampling=sampling,
            draws=draws,
            on_step=self._callback(callback_on_step_end),
            progress=lambda steps: tqdm(steps, **self._progress),
        )
        frames = self._decode(codes, output_type, vae_batch_size)
        return UrsaOutput(frames)

    def _times(self, clock: Clock | Sequence[float], num_steps: int, shift: float) -> Tensor:
        """Return the start times of the steps, shape (n,)."""
        if not isinstance(clock, str):
            if len(clock) != num_steps:
                raise ConfigError(
                    f"clock has {len(clock)} times for {num_steps} num_inference_steps; leave the "
                    "number out, or give as many times"
                )
            return checked_times(clock)
        match clock:
            case "official":
                return inference_times(num_steps, shift)
            case "linear":
                if not isinstance(self.path, MetricPath):
                    raise ConfigError("clock 'linear' needs a metric path; take 'official'")
                if self._distance_by_time is None:
                    self._distance_by_time = distance_by_time(self.path)
                return equal_drops(num_steps, *self._distance_by_time)
            case "entropy":
                curve = self.defaults.loss_curve
                if not curve:
                    raise ConfigError(
                        "clock 'entropy' follows the held-out loss by t (loss_curve of "
                        "generation_config.json), which this model does not bring; take "
                        "'official', or give the times"
                    )
                return equal_drops(num_steps, *zip(*curve, strict=True))
        raise ConfigError(f"clock must be official, linear, entropy or times; got {clock}")

    def _callback(self, on_step_end: OnStepEnd | None) -> OnStep:
        """Return what the sampler calls after a step: it gives codes, and whether to stop."""
        self.interrupt = False
        call = copy.copy(self)  # two calls at once must not stop each other

        def after(step: int, t: float, codes: Tensor) -> tuple[Tensor, bool]:
            if on_step_end is not None:
                changed = on_step_end(call, step, t, {"latents": codes.clone()})
                codes = (changed or {}).get("latents", codes)
            return codes, call.interrupt or self.interrupt

        return after

    def _prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_ids: Tensor | None,
        negative_prompt_ids: Tensor | None,
        *,
        motion_score: float | None,
        length: int,
        copies: int,
    ) -> tuple[Tensor, Tensor]:
        """Return ids of the prompts and negative prompts, one row a video, shape (B, L) each."""
        if copies < 1:
            raise ConfigError(f"num_videos_per_prompt must be at least 1, got {copies}")
        if motion_score is not None and not 0 <= motion_score < float("inf"):
            raise ConfigError(f"motion_score must be at least 0, px/s, got {motion_score}")
        if prompt_ids is None:
            if prompt is None:
                raise ConfigError("a prompt is needed: give prompt or prompt_ids")
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not texts:
                raise ConfigError("prompt is an empty list; give at least one text")
            check_texts("prompt", texts)
            prompt_ids = self.text_tokenizer.encode(
                [motion_prompt(text, motion_score) for text in texts], max_length=length
            )
        if prompt_ids.ndim != 2 or not prompt_ids.numel():
            raise ConfigError(
                f"prompt_ids must have shape (prompts, L), got {tuple(prompt_ids.shape)}"
            )
        if negative_prompt_ids is None:
            texts = per_video(negative_prompt or "", len(prompt_ids), "negative_prompt")
            check_texts("negative_prompt", texts)
            negative_prompt_ids = self.text_tokenizer.encode(texts, max_length=prompt_ids.shape[1])
        negative_prompt_ids = share(negative_prompt_ids, len(prompt_ids))
        if prompt_ids.shape != negative_prompt_ids.shape:
            raise ConfigError(
                "prompt_ids and negative_prompt_ids must have one shape, got "
                f"{tuple(prompt_ids.shape)} and {tuple(negative_prompt_ids.shape)}"
            )
        num_text = self.transformer.config.lm_vocab_size
        for name, ids in (("prompt_ids", prompt_ids), ("negative_prompt_ids", negative_prompt_ids)):
            check_ids(name, ids, num_text)
        pair = [
            ids.to(self.device).long().repeat_interleave(copies, dim=0)
            for ids in (prompt_ids, negative_prompt_ids)
        ]
        return pair[0], pair[1]

    def _conditions(
        self,
        image: Picture | Sequence[Picture] | None,
        last_image: Picture | None,
        video: Clip | Sequence[Clip] | None,
        cond_latents: Tensor | None,
        cond_indices: Sequence[int] | None,
        size: tuple[int, int],
        shape: tuple[int, int, int],
        counts: tuple[int, int],
    ) -> Conditions:
        num_prompts, num_videos = counts
        given = [
            name
            for name, value in (("image", image), ("video", video), ("cond_latents", cond_latents))
            if value is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"give one of image, video and cond_latents, got {', '.join(given)}")
        if cond_indices is not None and cond_latents is None and video is None:
            raise ConfigError("cond_indices choose frames of cond_latents or video; give one")
        codes = cond_latents
        if codes is not None:
            check_tensor("cond_latents", codes)
        if image is not None:
            codes = encode_picture(image, self.visual_tokenizer, size)
        elif video is not None:
            codes = encode_clip(video, self.visual_tokenizer, size)
        conditions = no_conditions(num_videos, shape)
        if codes is not None:
            check_ids("cond_latents", codes, len(self.codebook))
            if len(codes) not in {1, num_prompts, num_videos}:
                raise ConfigError(
                    f"{len(codes)} conditions are given for {num_prompts} prompts and {num_videos} "
                    "videos; give one, one a prompt or one a video"
                )
            conditions = given_codes(codes, cond_indices, num_videos=num_videos, shape=shape)
        if last_image is not None:
            if shape[0] < 2:
                raise ConfigError("last_image needs a clip: ask for more frames than one")
            num_frames = 1 + (shape[0] - 1) * self.visual_tokenizer.temporal_stride
            last = encode_last(last_image, self.visual_tokenizer, size, num_frames)
            conditions.codes[:, -1:] = share(last, num_videos).cpu()
            conditions.given[-1] = True
        return replace(conditions, codes=conditions.codes.to(self.device))

    def _start(
        self,
        latents: Tensor | None,
        conditions: Conditions,
        noise_scale: float,
        shape: tuple[int, int, int],
        draws: Draws,
    ) -> Tensor:
        """Return the codes that the first step reads, shape (B, T, h, w)."""
        full = (len(conditions.codes), *shape)
        if latents is None:
            codes = draws.source(self.path).to(self.device)
        else:
            check_tensor("latents", latents)
            if tuple(latents.shape) != full or latents.is_floating_point():
                raise ConfigError(
                    f"latents must be codes of shape {full}, got {latents.dtype} "
                    f"{tuple(latents.shape)}"
                )
            check_ids("latents", latents, len(self.codebook))
            codes = latents.to(self.device).long().clone()
        known = conditions.codes
        if noise_scale > 0 and bool(conditions.given.any()):
            known = draws.noised(self.path, known, conditions.given, 1 - noise_scale)
        given = conditions.given.to(codes.device)[:, None, None]
        return torch.where(given, known.to(codes.device), codes)

    def _decode(self, codes: Tensor, output_type: OutputType, batch_size: int) -> Any:
        if output_type == "latent":
            return codes
        if output_type == "pt":
            return self.visual_tokenizer.decode_pixels(codes, batch_size=batch_size)
        frames = self.visual_tokenizer.decode(codes, batch_size=batch_size)
        if output_type == "pil" and frames.shape[1] == 1:
            return [Image.fromarray(video[0]) for video in frames]
        return frames


def _or(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value
