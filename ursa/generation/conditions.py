"""Given frames: which latent frames are known, how well, and when they begin to move.

All modes are one. Every latent frame has a time at which it starts: 0 for a frame that is drawn
from noise, 1 for one that is given and held, 1 - s for one that is given with noise of scale s.
While the clock of the sampler runs from 0 to 1, a frame waits until its own time has come: the
asynchronous schedule of the paper with one condition mask.

Dimensions: B = videos, F = frames, T = latent frames, H, W = pixels, h, w = rows and columns.

References:
    URSA, arXiv 2510.24717, section 3.3 (asynchronous timesteps) and 4.3 (conditioning).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ursa.errors import ConfigError
from ursa.generation.limits import check_picture
from ursa.tokenizers.visual import AutoencoderTokenizer
from ursa.video.decode import fit_frames

logger = logging.getLogger(__name__)

Picture = Image.Image | np.ndarray
Clip = np.ndarray | Tensor | Sequence[Image.Image]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Codes of the given latent frames.

    Attributes:
        codes: Shape (B, T, h, w), int64; what stands in frames that are not given is not read.
        given: Which latent frames are given, shape (T,), bool.
    """

    codes: Tensor
    given: Tensor


def no_conditions(num_videos: int, shape: tuple[int, int, int]) -> Conditions:
    """Return conditions that give nothing.

    Args:
        num_videos: B.
        shape: (T, h, w).
    """
    return Conditions(
        codes=torch.zeros(num_videos, *shape, dtype=torch.int64),
        given=torch.zeros(shape[0], dtype=torch.bool),
    )


def given_codes(
    codes: Tensor,
    indices: Sequence[int] | None,
    *,
    num_videos: int,
    shape: tuple[int, int, int],
) -> Conditions:
    """Place codes among the latent frames.

    Args:
        codes: Integers, shape (1, prompts or videos; T', h, w). Without indices they are the first
            T' frames; with them frame i of the codes is latent frame i of the clip, as in the
            official call.
        indices: Latent frames that are given; negative ones count from the end.
        num_videos: B.
        shape: (T, h, w).

    Returns:
        The codes and which frames they are, on the CPU.

    Raises:
        ConfigError: If the shapes do not fit or codes are no integers.
    """
    integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
    if not integer or codes.ndim != 4 or tuple(codes.shape[2:]) != shape[1:]:
        raise ConfigError(
            f"cond_latents must be codes of shape (1 or {num_videos}, frames, {shape[1]}, "
            f"{shape[2]}), integers, got {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.shape[1] > shape[0]:
        raise ConfigError(
            f"the clip has {shape[0]} latent frames, but {codes.shape[1]} are given; ask for more "
            "frames or give fewer"
        )
    conditions = no_conditions(num_videos, shape)
    chosen = range(codes.shape[1]) if indices is None else indices
    for index in chosen:
        # a negative one counts from the end of both, as in the official code
        place, source = (
            index + size if index < 0 else index for size in (shape[0], codes.shape[1])
        )
        if not (0 <= place < shape[0] and 0 <= source < codes.shape[1]):
            raise ConfigError(
                f"cond_indices must be latent frames of cond_latents, 0..{codes.shape[1] - 1}, "
                f"got {index}"
            )
        conditions.codes[:, place] = share(codes, num_videos)[:, source].cpu()
        conditions.given[place] = True
    return conditions


def encode_picture(
    pictures: Picture | Sequence[Picture], tokenizer: AutoencoderTokenizer, size: tuple[int, int]
) -> Tensor:
    """Encode one image, or one a prompt, to codes of shape (1 or prompts, 1, h, w).

    Args:
        pictures: PIL images or uint8 arrays (H, W, 3) or (prompts, H, W, 3).
        tokenizer: Frames to codes.
        size: (height, width) in pixels; others are cropped about the centre and resized, with a
            warning.

    Returns:
        Ids, shape (1 or prompts, 1, h, w), int64.

    Raises:
        ConfigError: If something is no picture.
    """
    several = isinstance(pictures, Sequence) or (
        isinstance(pictures, np.ndarray) and pictures.ndim == 4
    )
    items: list[Any] = list(pictures) if several else [pictures]  # type: ignore[arg-type]
    if not items:
        raise ConfigError("image is an empty list; give at least one picture")
    frames = np.stack([_fit(_array(item)[None], size, "image") for item in items])
    return tokenizer.encode(frames)


def encode_clip(
    clip: Clip | Sequence[Clip], tokenizer: AutoencoderTokenizer, size: tuple[int, int]
) -> Tensor:
    """Encode one clip, or one a prompt, to codes of shape (1 or prompts, T', h, w).

    Args:
        clip: uint8 array or tensor (F, H, W, 3) or (prompts, F, H, W, 3), a list of PIL images, or
            a list of such clips; F fits the visual tokenizer (1 + 4k).
        tokenizer: Frames to codes.
        size: (height, width) in pixels, as for `encode_picture`.

    Returns:
        Ids, shape (1 or prompts, T', h, w), int64.

    Raises:
        ConfigError: If it is no clip.
        DataError: If the number of frames does not fit; it names the nearest that do.
    """
    array = _frames(clip)
    clips = array if array.ndim == 5 else array[None]
    if clips.ndim != 5 or clips.dtype != np.uint8 or clips.shape[-1] != 3:
        raise ConfigError(
            "video must be uint8 of shape (frames, height, width, 3), or several such, got "
            f"{array.dtype} {array.shape}"
        )
    return tokenizer.encode(np.stack([_fit(item, size, "video") for item in clips]))


def _frames(clip: Any) -> np.ndarray:
    """Return a clip, or several, as one array."""
    if isinstance(clip, Image.Image):
        return _array(clip)
    if isinstance(clip, Tensor):
        return clip.cpu().numpy()
    if isinstance(clip, str | bytes | PathLike):
        raise ConfigError(
            f"video must be frames, got {clip!r}; read the file first: "
            "ursa.video.foreign.read_last_frames, or ursa generate --video"
        )
    if not isinstance(clip, Sequence):
        return np.asarray(clip)
    arrays = [_frames(item) for item in clip]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ConfigError(
            "the frames of a video, and several videos, must have one shape, got "
            f"{sorted(shapes) or 'none'}"
        )
    return np.stack(arrays)


def encode_last(
    picture: Picture, tokenizer: AutoencoderTokenizer, size: tuple[int, int], num_frames: int
) -> Tensor:
    """Encode an image as the end of a clip that stands still.

    A latent frame after the first holds several frames; those of a standing clip are the picture.

    Args:
        picture: PIL image or uint8 array (H, W, 3).
        tokenizer: Frames to codes.
        size: (height, width) in pixels, as for `encode_picture`.
        num_frames: F, frames of the clip, 1 + 4k.

    Returns:
        Ids of the last latent frame, shape (1, 1, h, w), int64.

    Raises:
        ConfigError: If it is no picture.
        DataError: If the number of frames does not fit.
    """
    frame = _fit(_array(picture)[None], size, "last_image")
    still = np.repeat(frame, num_frames, axis=0)
    return tokenizer.encode(still[None])[:, -1:]


def share(values: Tensor, num_videos: int) -> Tensor:
    """Return one row a video of rows that are one, one a prompt, or one a video.

    Args:
        values: Rows, shape (1, prompts or videos; ...).
        num_videos: B, the videos of a prompt standing together.

    Returns:
        Shape (B, ...).

    Raises:
        ConfigError: If their number divides the number of videos in no such way.
    """
    if num_videos % len(values):
        raise ConfigError(
            f"one condition, one a prompt or one a video is needed ({num_videos} videos), got "
            f"{len(values)}"
        )
    return values.repeat_interleave(num_videos // len(values), dim=0)


def frame_clock(start: Tensor, t: float, t_next: float) -> tuple[Tensor, Tensor]:
    """Return begin and end of a step for every latent frame.

    Args:
        start: When each frame begins to move, shape (T,), in [0, 1].
        t: The sampler's time at the begin of the step.
        t_next: At its end.

    Returns:
        Times, shape (T,) each, float32; equal where a frame waits.
    """
    moves = start < t_next
    begin = torch.where(moves, start.clamp_min(t), torch.full_like(start, t))
    end = torch.where(moves, torch.full_like(start, t_next), torch.full_like(start, t))
    return begin, end


def _array(picture: Picture) -> np.ndarray:
    if isinstance(picture, Image.Image):
        check_picture(picture, "an image")
        return np.asarray(picture.convert("RGB"))
    array = np.asarray(picture)
    if not array.size or array.ndim != 3 or array.dtype != np.uint8 or array.shape[-1] != 3:
        raise ConfigError(
            "an image must be a PIL image or uint8 of shape (height, width, 3), got "
            f"{array.dtype} {array.shape}"
        )
    return array


def _fit(frames: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    if frames.shape[1:3] != size:
        logger.warning(
            "%s of %d x %d is cropped about its centre and resized to %d x %d (width x height)",
            *(name, frames.shape[2], frames.shape[1], size[1], size[0]),
        )
    return fit_frames(frames, height_px=size[0], width_px=size[1])
