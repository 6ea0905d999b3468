"""Clips longer than the model's: window by window, each going on from the end of the one before.

References:
    URSA, arXiv 2510.24717, section 4.3: long video by extrapolation, 13 given frames of 49.
"""

from collections.abc import Callable

import numpy as np

from ursa.errors import ConfigError, size_hint

GenerateWindow = Callable[[np.ndarray | None, int], np.ndarray]
"""Takes the frames that are given, uint8 (F', H, W, 3) or None, and a number of frames F; returns
uint8 (F, H, W, 3)."""


def slide_window(
    generate: GenerateWindow,
    *,
    num_frames: int,
    window_frames: int,
    overlap_frames: int,
    temporal_stride: int,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Generate a clip of any length.

    Frames that stand are never drawn again: of every window only what follows the overlap is
    taken. The last window is as short as the rest allows and its surplus is dropped.

    Args:
        generate: One window; usually a call of `UrsaPipeline` with the prompt.
        num_frames: Frames of the whole clip, the given ones included.
        window_frames: Frames of a window, 1 + s k with s the temporal stride.
        overlap_frames: Frames at the end of a window that the next one is given, 1 + s k, fewer.
        temporal_stride: s of the visual tokenizer.
        given: First frames, uint8 (F', H, W, 3); their last `overlap_frames` at most are read.

    Returns:
        uint8 frames, shape (num_frames, H, W, 3).

    Raises:
        ConfigError: If the counts do not fit together.
    """
    if given is None and num_frames <= window_frames:
        return generate(None, num_frames)
    for name, value in (("window_frames", window_frames), ("overlap_frames", overlap_frames)):
        if hint := size_hint(value, temporal_stride, 1):
            raise ConfigError(f"{name} must be 1 + {temporal_stride}k, got {value}; {hint}")
    if overlap_frames >= window_frames:
        raise ConfigError(
            f"overlap_frames {overlap_frames} must be less than window_frames {window_frames}"
        )
    frames = generate(None, window_frames) if given is None else given
    while len(frames) < num_frames:
        kept = min(overlap_frames, 1 + (len(frames) - 1) // temporal_stride * temporal_stride)
        missing = num_frames - len(frames)
        # whole latent frames are added, as many as the window holds or the rest needs
        added = -(-missing // temporal_stride) * temporal_stride
        size = min(window_frames, kept + added)
        frames = np.concatenate([frames, generate(frames[-kept:], size)[kept:]])
    return frames[:num_frames]
