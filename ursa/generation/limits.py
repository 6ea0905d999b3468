"""How large a call may be: refused before memory is used, with what was asked for and what may be.

Memory is compared by arithmetic (`ursa.model.size`) with all that the device has; what is smaller
than that may still not fit beside other things.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from ursa.errors import ConfigError
from ursa.model.config import TransformerConfig
from ursa.model.size import LOGITS_AT_ONCE, MAX_SIDE_PX, Clip, activation_bytes, machine_bytes

MAX_PROMPT_CHARACTERS = 10_000
"""A text of a thousand words; the network reads 320 ids."""
MAX_INFERENCE_STEPS = 10_000
MAX_FILE_BYTES = 256 << 20
"""Of a given picture."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Of given pictures; Pillow would start another program for some others."""
_FLOAT32_BYTES, _INT64_BYTES, _CHANNELS = 4, 8, 3
_LOGITS_COPIES, _CODE_COPIES = 2, 4


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Check that texts are not too long.

    Args:
        name: What the error calls them.
        texts: The texts.

    Raises:
        ConfigError: If one has more than `MAX_PROMPT_CHARACTERS`.
    """
    longest = max((len(text) for text in texts), default=0)
    if longest > MAX_PROMPT_CHARACTERS:
        raise ConfigError(
            f"{name} must have at most {MAX_PROMPT_CHARACTERS:,} characters, got {longest:,}"
        )


def check_memory(
    config: TransformerConfig,
    clip: Clip,
    *,
    num_videos: int,
    frame_px: tuple[int, int, int],
    is_guided: bool,
    bytes_per_value: int,
    device: torch.device,
) -> None:
    """Check that a call can fit into the device, and its frames into this machine.

    Args:
        config: The network.
        clip: Latent frames, rows and columns of a video, and ids of a prompt.
        num_videos: Videos at once.
        frame_px: Frames, height and width in pixels.
        is_guided: Whether each video goes through the network twice.
        bytes_per_value: Of the weights.
        device: Where the network is.

    Raises:
        ConfigError: If not; says how much is needed and how much there is.
    """
    codes = num_videos * clip.num_visual_tokens
    network = activation_bytes(
        config,
        clip,
        num_sequences=num_videos * (2 if is_guided else 1),
        bytes_per_value=bytes_per_value,
    )
    logits = _LOGITS_COPIES * _FLOAT32_BYTES * min(codes * config.lm_head_size, LOGITS_AT_ONCE)
    needed = network + logits + _CODE_COPIES * _INT64_BYTES * codes
    there = device_bytes(device)
    if needed > there:
        _refuse(f"{num_videos} x {clip.num_visual_tokens:,} visual tokens", needed, there, device)
    frames, height, width = frame_px
    check_frames(num_videos * frames, height, width)


def check_frames(num_frames: int, height_px: int, width_px: int) -> None:
    """Check that frames fit into the memory of this machine, as bytes and once as float32.

    Args:
        num_frames: Frames of all videos.
        height_px: Height.
        width_px: Width.

    Raises:
        ConfigError: If not; says how much is needed and how much there is.
    """
    needed = num_frames * height_px * width_px * _CHANNELS * (1 + _FLOAT32_BYTES)
    there = machine_bytes()
    if needed > there:
        what = f"{num_frames:,} frames of {height_px} x {width_px}"
        _refuse(what, needed, there, torch.device("cpu"))


def _refuse(what: str, needed: int, there: int, device: torch.device) -> None:
    raise ConfigError(
        f"{what} need about {needed / 1e9:,.0f} GB, and {device} has {there / 1e9:,.0f} GB in all; "
        "ask for fewer frames, smaller ones, fewer videos or a shorter prompt"
    )


def device_bytes(device: torch.device) -> int:
    """Return the memory of a device, free or not.

    Args:
        device: Any; what is no CUDA device has the memory of this machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def open_picture(path: Path, what: str) -> Image.Image:
    """Read a picture of a user.

    Args:
        path: The file.
        what: What the error calls it.

    Returns:
        The picture as it is meant to be seen, in RGB.

    Raises:
        ConfigError: If the file or its sides are too large, or it is none of the usual formats.
    """
    from PIL import ImageOps  # noqa: PLC0415

    try:
        if (num_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(  # noqa: TRY301
                f"{what}: {path} has {num_bytes:,} bytes, expected at most {MAX_FILE_BYTES:,}"
            )
        with Image.open(path, formats=_FORMATS) as picture:
            check_picture(picture, what)
            return ImageOps.exif_transpose(picture).convert("RGB")
    except ConfigError:
        raise
    # what Pillow raises of damaged files beside its own errors
    except (
        *(UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError),
        *(ValueError, TypeError),
    ) as error:
        raise ConfigError(
            f"{what}: {path} is not an image that can be read ({error}); give a PNG or JPEG file"
        ) from error


def check_picture(picture: Image.Image, what: str) -> None:
    """Check the sides of a picture, of which only the header need be read.

    Args:
        picture: The picture.
        what: What the error calls it.

    Raises:
        ConfigError: If a side is longer than `MAX_SIDE_PX`.
    """
    if max(picture.size) > MAX_SIDE_PX:
        width, height = picture.size
        raise ConfigError(
            f"{what} must have at most {MAX_SIDE_PX} pixels a side, got {width} x {height}"
        )
