"""Raw measurements of a clip; what is good enough is decided elsewhere.

Frames are pushed one by one; kept are running sums, a few pictures and two numbers a frame. What
each score means, how well it does and where it comes from is in docs/filters.md.

References:
    Sharpness as the variance of the Laplacian: Pech-Pacheco et al., ICPR 2000.
"""

import cv2
import numpy as np

from ursa.artifacts import ClipScores
from ursa.video.borders import black_border_fraction
from ursa.video.exposure import ExposureMeter, flicker_levels
from ursa.video.motion import MOTION_FPS, MOTION_WIDTH_PX, FlowMeter
from ursa.video.overlays import OverlayMeter, TextMeter
from ursa.video.stillness import StillnessMeter

HASHED_FRAMES = 9
FOOTAGE_FPS = 8.0
"""Frames hashed a second to find footage again, wherever a clip begins."""
_HASH_SIDE = 8
_HASH_INPUT_SIDE = 32
_LEAST_CONTRAST = 2.0
"""Standard deviation of luma; below it the signs of a picture are those of noise."""


class ClipMeter:
    """Measures one clip from its frames in order."""

    def __init__(self, *, fps: float, num_frames: int) -> None:
        """Start a clip.

        Args:
            fps: Frame rate of the clip, frames per second.
            num_frames: Number of frames that will be added; `hashed_frames` and `footage_frames`
                of them are hashed.
        """
        self._fps = fps
        self._hashed_frames = hashed_frames(num_frames)
        self._footage_frames = footage_frames(num_frames, fps)
        self._num_frames = 0
        self._flow = FlowMeter()
        self._exposure = ExposureMeter()
        self._stillness = StillnessMeter(fps)
        self._text = TextMeter(fps)
        self._overlay = OverlayMeter()
        self._motion_step = max(1, round(fps / MOTION_FPS))
        self._num_pairs = 0
        self._previous: np.ndarray | None = None
        self._brightest: np.ndarray | None = None
        self._motion_sum = 0.0
        self._camera_sum = 0.0
        self._object_sum = 0.0
        self._sharpness_sum = 0.0
        self._luminance_sum = 0.0
        self._lumas: list[float] = []
        self._hashes: list[str] = []
        self._footage: list[str] = []

    def add(self, frame: np.ndarray) -> None:
        """Take in the next frame.

        Args:
            frame: RGB picture, shape (H, W, 3), uint8.
        """
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        small = _at_motion_width(luma)
        if self._num_frames % self._motion_step == 0:
            self._add_motion(small)
        self._sharpness_sum += float(cv2.Laplacian(luma, cv2.CV_32F).var())
        self._lumas.append(float(luma.mean()))
        self._luminance_sum += self._lumas[-1]
        self._brightest = luma if self._brightest is None else cv2.max(self._brightest, luma)
        self._exposure.add(luma)
        self._stillness.add(small)
        self._text.add(luma)
        self._add_hashes(luma)
        self._num_frames += 1

    def scores(self) -> ClipScores:
        """Return the measurements of all frames added so far."""
        if self._brightest is None:
            return ClipScores(**dict.fromkeys(ClipScores.model_fields))
        dark, bright, black = self._exposure.fractions()
        distinct = self._stillness.distinct_frames()
        is_whole = len(self._hashes) == HASHED_FRAMES
        return ClipScores(
            motion_px_per_s=self._per_second(self._motion_sum),
            camera_motion_px_per_s=self._per_second(self._camera_sum),
            object_motion_px_per_s=self._per_second(self._object_sum),
            sharpness=self._sharpness_sum / self._num_frames,
            luminance=self._luminance_sum / self._num_frames,
            dark_fraction=dark,
            bright_fraction=bright,
            black_fraction=black,
            black_border_fraction=black_border_fraction(self._brightest),
            freeze_fraction=self._stillness.freeze_fraction(),
            slideshow_fraction=self._stillness.slideshow_fraction(),
            distinct_fps=self._stillness.distinct_fps(),
            flicker=flicker_levels([self._lumas[index] for index in distinct]),
            text_area_fraction=self._text.area_fraction(),
            static_overlay_fraction=self._overlay.area_fraction(),
            perceptual_hash="".join(self._hashes) if is_whole else None,
            frame_hashes=bytes.fromhex("".join(self._footage)) if is_whole else None,
        )

    def _per_second(self, displacement_sum: float) -> float | None:
        """Return a sum over pairs of pictures as a speed; None if there is no pair."""
        pair_s = self._motion_step / self._fps
        return displacement_sum / (self._num_pairs * pair_s) if self._num_pairs else None

    def _add_hashes(self, luma: np.ndarray) -> None:
        times = self._hashed_frames.count(self._num_frames)
        footage_times = self._footage_frames.count(self._num_frames)
        if times or footage_times:
            text = perceptual_hash(luma)
            self._hashes += [text] * times
            self._footage += [text] * footage_times

    def _add_motion(self, small: np.ndarray) -> None:
        if self._previous is not None:
            moved = self._flow.measure(self._previous, small)
            self._motion_sum += moved.total_px
            self._camera_sum += moved.camera_px
            self._object_sum += moved.object_px
            self._num_pairs += 1
            self._overlay.add(small, moved)
        self._previous = small


def _at_motion_width(luma: np.ndarray) -> np.ndarray:
    height_px, width_px = luma.shape
    size = (MOTION_WIDTH_PX, max(16, round(height_px * MOTION_WIDTH_PX / width_px)))
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)


def hashed_frames(num_frames: int) -> list[int]:
    """Return the frames of a clip that are hashed: the middles of `HASHED_FRAMES` equal parts.

    Args:
        num_frames: Number of frames of the clip; a very short one gives the same frame twice.
    """
    return [(2 * part + 1) * num_frames // (2 * HASHED_FRAMES) for part in range(HASHED_FRAMES)]


def footage_frames(num_frames: int, fps: float) -> list[int]:
    """Return the frames of a clip that are hashed `FOOTAGE_FPS` times a second.

    Args:
        num_frames: Number of frames of the clip.
        fps: Frame rate of the clip, frames per second; a slower one gives the same frame twice.
    """
    number = int(num_frames * FOOTAGE_FPS / fps)
    return [int((place + 0.5) * fps / FOOTAGE_FPS) for place in range(number)]


def perceptual_hash(luma: np.ndarray) -> str:
    """Return a 64-bit hash that changes little when a picture is scaled or recompressed.

    Args:
        luma: Picture, shape (H, W), uint8.

    Returns:
        16 hexadecimal digits: the signs of the 8 x 8 lowest DCT coefficients about their median;
        zeros alone if there is nothing to see, as in a picture of one colour.
    """
    side = (_HASH_INPUT_SIDE, _HASH_INPUT_SIDE)
    small = cv2.resize(luma, side, interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _LEAST_CONTRAST:
        return "0" * (_HASH_SIDE * _HASH_SIDE // 4)
    low = cv2.dct(small)[:_HASH_SIDE, :_HASH_SIDE].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits).tobytes().hex()
