"""UrsaPipeline: prompt, and frames if there are any, to frames.

All modes are one: a set of latent frames is given and held, the others are drawn from noise.

Dimensions: B = videos, T = frames or latent frames, H, W = rows and columns, V = codes.

References:
    URSA, arXiv 2510.24717, section 3.3 and algorithm 2.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ursa.config import FrozenModel
from ursa.diffusion.path import MetricPath
from ursa.diffusion.solver import draw_posterior, euler_step, guide
from ursa.diffusion.timesteps import inference_times
from ursa.errors import ConfigError
from ursa.model.pretrained import load_transformer, save_transformer
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TextTokenizer, load_text_tokenizer, motion_prompt
from ursa.tokenizers.visual import (
    AutoencoderTokenizer,
    load_visual_tokenizer,
    save_visual_tokenizer,
)
from ursa.video.decode import fit_frames

OutputType = Literal["pil", "np", "latent"]
OnStepEnd = Callable[[int, float, Tensor], None]


class SampleDefaults(FrozenModel):
    """What the model was trained on: sizes and steps where a call names none.

    `motion_score` is the median motion of the training clips, a sensible value to ask for;
    `max_prompt_length` is the number of ids that prompts were padded or cut to.
    """

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_trunc: float
    temperature: float
    flow_shift: float
    motion_score: float | None
    max_prompt_length: int


class SchedulerConfig(FrozenModel):
    """The path's schedule beta_t = c (t / (1 - t)) ** alpha."""

    alpha: float
    c: float
    shift: float


@dataclass(frozen=True, slots=True)
class UrsaOutput:
    """Generated videos.

    Attributes:
        frames: "pil": a list of videos, each a list of images; "np": uint8 (B, T, H, W, 3);
            "latent": int64 codes (B, T', H / 8, W / 8).
    """

    frames: Any


class UrsaPipeline:
    """A transformer, its path and its tokenizers."""

    def __init__(
        self,
        *,
        transformer: UrsaTransformer,
        scheduler: SchedulerConfig,
        visual_tokenizer: AutoencoderTokenizer,
        text_tokenizer: TextTokenizer,
        defaults: SampleDefaults,
    ) -> None:
        """Take the parts over for inference."""
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        self.visual_tokenizer = visual_tokenizer
        self.text_tokenizer = text_tokenizer
        self.defaults = defaults
        self.path = MetricPath(visual_tokenizer.codebook, alpha=scheduler.alpha, c=scheduler.c)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "UrsaPipeline":
        """Read a directory written by `save_pretrained`.

        Raises:
            ConfigError: If it is not such a directory.
        """
        root = Path(directory)
        index = root / "model_index.json"
        if not index.is_file():
            raise ConfigError(f"no model at {root}: model_index.json is missing")
        values = json.loads(index.read_text("utf-8"))
        return cls(
            transformer=load_transformer(root / "transformer"),
            scheduler=SchedulerConfig.model_validate_json(
                (root / "scheduler" / "scheduler_config.json").read_bytes()
            ),
            visual_tokenizer=load_visual_tokenizer(root / "vae"),
            text_tokenizer=load_text_tokenizer(root / "tokenizer"),
            defaults=SampleDefaults.model_validate(values["defaults"]),
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model_index.json, transformer/, scheduler/, vae/ and tokenizer/; no pickle."""
        root = Path(directory)
        (root / "scheduler").mkdir(parents=True, exist_ok=True)
        index = {
            "_class_name": "UrsaPipeline",
            "transformer": ["ursa.model.transformer", "UrsaTransformer"],
            "scheduler": ["ursa.diffusion.path", "MetricPath"],
            "vae": ["ursa.tokenizers.visual", "AutoencoderTokenizer"],
            "tokenizer": ["ursa.tokenizers.text", "TextTokenizer"],
            "defaults": self.defaults.model_dump(mode="json"),
        }
        (root / "model_index.json").write_text(json.dumps(index, indent=2), "utf-8")
        save_transformer(self.transformer, root / "transformer")
        (root / "scheduler" / "scheduler_config.json").write_text(
            self.scheduler.model_dump_json(indent=2), "utf-8"
        )
        save_visual_tokenizer(self.visual_tokenizer.network, root / "vae")
        self.text_tokenizer.save(root / "tokenizer")

    @torch.inference_mode()
    def __call__(  # noqa: PLR0913  (mirrors the known call of diffusers)
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        image: Image.Image | np.ndarray | None = None,
        video: np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_trunc: float | None = None,
        temperature: float | None = None,
        flow_shift: float | None = None,
        motion_score: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> UrsaOutput:
        """Generate one video for every prompt.

        Args:
            prompt: One text or several.
            negative_prompt: What the unconditional branch reads.
            image: First frame, PIL or uint8 (H, W, 3); it is held.
            video: First frames, uint8 (1 + 4k, H, W, 3); they are held.
            height: Pixels, divisible by 8; None is what the model was trained on.
            width: Pixels, divisible by 8.
            num_frames: 1 + 4k; 1 is an image.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Classifier-free guidance, 1 is off.
            guidance_trunc: From this t on guidance is off.
            temperature: The guided logits are divided by it before x_1 is drawn; 1 is the model's
                own law, less gives fewer wrong codes and less variety.
            flow_shift: Timestep shift of the sampler, 1 is none.
            motion_score: Asked motion in px/s at 256 px width; None writes no prefix.
            generator: A generator for all, or one a prompt, so that a video does not depend on
                its neighbours. It moves on, as in torch; nothing else in it changes.
            output_type: "pil", "np" or "latent".
            callback_on_step_end: Called with (step, t, codes) after every step.

        Returns:
            The videos.

        Raises:
            ConfigError: If a size does not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = self._given_codes(image, video, height, width)
        shape = self._latent_shape(num_frames, height, width, given)
        steps = num_inference_steps or self.defaults.num_inference_steps
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        trunc = self.defaults.guidance_trunc if guidance_trunc is None else guidance_trunc
        heat = self.defaults.temperature if temperature is None else temperature
        if heat <= 0:
            raise ConfigError(f"temperature must be positive, got {heat:g}; 1 changes nothing")
        shift = self.defaults.flow_shift if flow_shift is None else flow_shift
        draw_uniform = _uniforms(generator, len(prompts), shape)
        length = self.defaults.max_prompt_length
        texts = [motion_prompt(text, motion_score) for text in prompts]
        text_ids = self.text_tokenizer.encode(texts, max_length=length)
        negative_ids = self.text_tokenizer.encode(
            [negative_prompt] * len(prompts), max_length=length
        )

        codes = (draw_uniform() * self.path.codebook_size).long()
        codes = codes.clamp_max(self.path.codebook_size - 1)
        held = torch.zeros(shape[0], dtype=torch.bool)
        if given is not None:
            held[: given.shape[1]] = True
            codes[:, : given.shape[1]] = given
        times = inference_times(steps, shift).tolist()
        for step, t in enumerate(times):
            logits = self._posterior(codes, text_ids, negative_ids, scale if t < trunc else 1.0)
            moved = draw_posterior(logits, draw_uniform(), temperature=heat)
            if step + 1 < steps:
                moved = euler_step(
                    self.path,
                    codes,
                    moved,
                    t=torch.tensor(t, dtype=torch.float32),
                    t_next=torch.tensor(times[step + 1], dtype=torch.float32),
                    uniforms=torch.stack([draw_uniform(), draw_uniform()]),
                )
            codes = torch.where(held[:, None, None], codes, moved)
            if callback_on_step_end is not None:
                callback_on_step_end(step, t, codes.clone())
        return UrsaOutput(self._decode(codes, output_type))

    def _posterior(
        self, codes: Tensor, text_ids: Tensor, negative_ids: Tensor, scale: float
    ) -> Tensor:
        if scale == 1.0:
            logits: Tensor = self.transformer(text_ids, codes)
        else:
            both = self.transformer(torch.cat([text_ids, negative_ids]), torch.cat([codes, codes]))
            conditional, unconditional = both.chunk(2)
            logits = guide(conditional, unconditional, scale)
        return logits.view(*codes.shape, -1)

    def _given_codes(
        self,
        image: Image.Image | np.ndarray | None,
        video: np.ndarray | None,
        height: int | None,
        width: int | None,
    ) -> Tensor | None:
        if image is not None and video is not None:
            raise ConfigError("give image or video, not both")
        if image is None and video is None:
            return None
        frames = video if video is not None else np.asarray(_rgb(image))[None]
        size = (width or self.defaults.width, height or self.defaults.height)
        fitted = fit_frames(frames, height_px=size[1], width_px=size[0])
        return self.visual_tokenizer.encode(fitted[None])

    def _latent_shape(
        self, num_frames: int | None, height: int | None, width: int | None, given: Tensor | None
    ) -> tuple[int, int, int]:
        stride_t = self.visual_tokenizer.temporal_stride
        stride_s = self.visual_tokenizer.spatial_stride
        frames = num_frames or self.defaults.num_frames
        if (frames - 1) % stride_t:
            low = 1 + (frames - 1) // stride_t * stride_t
            raise ConfigError(
                f"num_frames must be 1 + {stride_t}k, got {frames}; the nearest are {low} and "
                f"{low + stride_t}"
            )
        sizes = (height or self.defaults.height, width or self.defaults.width)
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size % stride_s:
                low = size // stride_s * stride_s
                raise ConfigError(
                    f"{name} must be divisible by {stride_s}, got {size}; the nearest are {low} "
                    f"and {low + stride_s}"
                )
        shape = (1 + (frames - 1) // stride_t, sizes[0] // stride_s, sizes[1] // stride_s)
        if given is not None and given.shape[1] > shape[0]:
            raise ConfigError(
                f"num_frames {frames} holds {shape[0]} latent frames, but {given.shape[1]} are "
                "given; ask for more frames or give fewer"
            )
        return shape

    def _decode(self, codes: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return codes
        frames = self.visual_tokenizer.decode(codes)
        if output_type == "np":
            return frames
        return [[Image.fromarray(frame) for frame in video] for video in frames]


def _uniforms(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_videos: int,
    shape: tuple[int, int, int],
) -> Callable[[], Tensor]:
    """Return a function that draws uniform numbers of shape (num_videos, *shape)."""
    if generator is None or isinstance(generator, torch.Generator):
        return lambda: torch.rand(num_videos, *shape, generator=generator)
    generators = list(generator)
    if len(generators) != num_videos:
        raise ConfigError(
            f"generator must be one or one a prompt ({num_videos}), got {len(generators)}"
        )
    return lambda: torch.stack([torch.rand(*shape, generator=item) for item in generators])


def _rgb(image: Image.Image | np.ndarray | None) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return np.asarray(image)
