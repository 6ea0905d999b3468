"""How well the scores of a clip tell what they are for, on clips with known answers.

    python tests/bench/detectors.py              # the tables of docs/filters.md, a few minutes
    python tests/bench/detectors.py --seeds 1    # a quick look
    python tests/bench/detectors.py --duplicates
    python tests/bench/detectors.py --footage    # long takes, cut elsewhere in their copies
    python tests/bench/detectors.py --cost       # time a frame, with and without each part

Every clip is made from drawn pictures and from frames of the videos in tests/data, written as
H.264 at a low rate and read back, so that the scores see noise of compression. For each score
there are clips that have the fault and difficult ones that have not. A clip counts as found if its
score is beyond the threshold given.
"""

import argparse
import collections
import functools
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from scipy.stats import spearmanr

from ursa.artifacts import ClipScores
from ursa.config import IngestionConfig, load_config
from ursa.video.borders import brighter_of, find_bars
from ursa.video.duplicates import HASH_DIGITS, find_clusters, find_likeness
from ursa.video.footage import ClipHashes, join_by_footage, lay_out
from ursa.video.scores import ClipMeter, footage_frames, hashed_frames, perceptual_hash
from ursa.video.shots import ShotDetector, cut_spans

FPS = 24.0
WIDTH, HEIGHT = 256, 144
NUM_FRAMES = 60
CRF = 26
VIDEOS = Path(__file__).parents[1] / "data" / "videos"
NUM_VIDEOS = 7
THRESHOLDS = {
    "black_fraction": 0.5,
    "freeze_fraction": 0.2,
    "slideshow_fraction": 0.3,
    "flicker": 1.5,
    "text_area_fraction": 0.01,
    "static_overlay_fraction": 0.002,
}
"""A clip beyond these is taken to have the fault; they bound the thresholds of a selection."""
HASH_BITS = 6
"""Frames whose hashes differ in at most so many bits are taken for the same picture."""
CUT_TOLERANCE = 2
"""A boundary is found if one is reported this near, frames."""


class Case(NamedTuple):
    """A clip and whether it has the fault."""

    name: str
    frames: np.ndarray
    is_faulty: bool


class Tally(NamedTuple):
    """Counts of one detector."""

    true_found: int
    false_found: int
    missed: int
    clean: int

    @property
    def precision(self) -> float:
        """Share of what was found that is there."""
        return self.true_found / max(self.true_found + self.false_found, 1)

    @property
    def recall(self) -> float:
        """Share of what is there that was found."""
        return self.true_found / max(self.true_found + self.missed, 1)


# --- pictures -------------------------------------------------------------------------------------


@functools.cache
def video_frame(index: int) -> np.ndarray:
    """A frame of one of the videos in tests/data, RGB, 256 px wide and 144 px high."""
    paths = sorted(VIDEOS.glob("*.mp4"))
    assert len(paths) == NUM_VIDEOS
    path = paths[index % len(paths)]
    with av.open(path.as_posix()) as container:
        frames = container.decode(video=0)
        for _ in range(40 + 11 * (index // len(paths))):
            next(frames)
        return next(frames).to_ndarray(format="rgb24", width=WIDTH, height=HEIGHT)


def drawn_picture(seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Soft and fine texture with shapes on it, RGB."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for grain, weight in ((24, 3.0), (8, 1.5), (2.5, 0.8), (1, 0.3)):
        noise = rng.normal(size=(height, width, 3)).astype(np.float32)
        soft = cv2.GaussianBlur(noise, (0, 0), grain)
        picture += weight * soft / soft.std()
    picture = 128 + 30 * picture / picture.std() + rng.normal(0, 20, 3).astype(np.float32)
    for _ in range(height * width // 4000):
        color = rng.uniform(20, 235, 3).tolist()
        center = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(4, 28)), int(rng.integers(4, 28)))
        cv2.ellipse(
            picture, center, axes, float(rng.uniform(0, 180)), 0, 360, color, -1, cv2.LINE_AA
        )
    return np.clip(picture, 0, 255).astype(np.uint8)


def picture(seed: int) -> np.ndarray:
    """A drawn picture or a frame of a video, by turns."""
    return drawn_picture(seed) if seed % 2 else video_frame(seed // 2)


def shifted(image: np.ndarray, x: float, y: float = 0.0, zoom: float = 1.0) -> np.ndarray:
    """The picture seen by a camera moved by (x, y) px; it is mirrored beyond its edges."""
    matrix = np.array([[zoom, 0, -x], [0, zoom, -y]], np.float32)
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(
        image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )


def pan(image: np.ndarray, step: float, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """The camera moves by `step` px a frame."""
    return np.stack([shifted(image, step * k, 0.3 * step * k) for k in range(num_frames)])


def still(image: np.ndarray, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Nothing moves."""
    return np.repeat(image[None], num_frames, axis=0)


def grainy(frames: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    """Noise that is new in every frame."""
    noise = np.random.default_rng(seed).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def scaled(frames: np.ndarray, gain: Sequence[float] | float, offset: float = 0) -> np.ndarray:
    """Every frame brighter or darker by a factor of its own."""
    factor = np.broadcast_to(np.asarray(gain, np.float32), len(frames))
    return np.clip(frames * factor[:, None, None, None] + offset, 0, 255).astype(np.uint8)


def dissolve(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """One shot turns into the other over the whole of their common length."""
    weight = ((np.arange(len(before)) + 1) / (len(before) + 1))[:, None, None, None]
    return ((1 - weight) * before + weight * after).astype(np.uint8)


def repeated(frames: np.ndarray, times: int) -> np.ndarray:
    """Only every so many-th frame, held."""
    return np.repeat(frames[::times], times, axis=0)[: len(frames)]


def with_object(frames: np.ndarray, side: int, step: float, seed: int) -> np.ndarray:
    """A textured square crosses the picture."""
    patch = drawn_picture(seed, height=side, width=side)
    out = frames.copy()
    top = (HEIGHT - side) // 2
    for k, frame in enumerate(out):
        left = int(10 + step * k) % (WIDTH - side)
        frame[top : top + side, left : left + side] = patch
    return out


def with_bars(frames: np.ndarray, rows: int, columns: int = 0, level: int = 0) -> np.ndarray:
    """Black bars over the edges of the picture."""
    out = frames.copy()
    for part in (out[:, :rows], out[:, HEIGHT - rows :], out[:, :, :columns]):
        part[:] = level
    out[:, :, WIDTH - columns :] = level
    return out


def with_text(frames: np.ndarray, seed: int) -> np.ndarray:
    """A line or two of text, white with a dark edge or plain."""
    rng = np.random.default_rng(seed)
    words = ["Revenge is coming", "subscribe now", "Breaking news: 24 dead", "NEXT EPISODE 7 pm"]
    fonts = [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX]
    font = fonts[int(rng.integers(len(fonts)))]
    scale = float(rng.uniform(0.35, 0.8))
    place = (int(rng.integers(4, 40)), int(rng.integers(30, HEIGHT - 8)))
    text = words[int(rng.integers(len(words)))]
    color, edge = ((255, 255, 255), (0, 0, 0)) if rng.uniform() < 0.7 else ((20, 20, 20), None)
    out = frames.copy()
    for frame in out:
        if edge is not None:
            cv2.putText(frame, text, place, font, scale, edge, 3, cv2.LINE_AA)
        cv2.putText(frame, text, place, font, scale, color, 1, cv2.LINE_AA)
    return out


def with_watermark(frames: np.ndarray, seed: int, alpha: float) -> np.ndarray:
    """A half transparent sign in a corner."""
    rng = np.random.default_rng(seed)
    mark = np.zeros((HEIGHT, WIDTH), np.uint8)
    x = int(rng.choice([12, WIDTH - 70]))
    y = int(rng.choice([14, HEIGHT - 32]))
    cv2.circle(mark, (x + 9, y + 9), 8, 255, 2, cv2.LINE_AA)
    cv2.putText(mark, "TV 5", (x + 20, y + 15), cv2.FONT_HERSHEY_DUPLEX, 0.5, 255, 1, cv2.LINE_AA)
    weight = (alpha / 255 * mark)[None, :, :, None]
    return ((1 - weight) * frames + weight * 255).astype(np.uint8)


# --- clips with known answers ---------------------------------------------------------------------


def clean_cases(seed: int) -> Iterator[Case]:
    """Difficult clips that have none of the faults of the later lists."""
    image = picture(seed)
    yield Case("slow pan", pan(image, 0.15), False)
    yield Case("pan", pan(image, 2.0), False)
    yield Case("fast pan", pan(image, 9.0), False)
    yield Case("pan with grain", grainy(pan(image, 1.0), 6.0, seed), False)
    yield Case("pan, low contrast", scaled(pan(image, 1.0), 0.25, 90), False)
    yield Case("dark pan", scaled(pan(image, 1.0), 0.2), False)
    fine = np.random.default_rng(seed).integers(60, 200, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    yield Case("fine texture", pan(cv2.GaussianBlur(fine, (0, 0), 0.8), 1.5), False)
    yield Case("12 fps source", repeated(pan(image, 1.5), 2), False)
    yield Case("6 fps source", repeated(pan(image, 1.5), 4), False)
    yield Case("fade in", scaled(pan(image, 1.0), np.linspace(0.25, 1, NUM_FRAMES)), False)
    zoom = [shifted(image, 0.3 * k, 0.2 * k, 1 + 0.004 * k) for k in range(NUM_FRAMES)]
    yield Case("zoom", np.stack(zoom), False)


def black_cases(seed: int) -> Iterator[Case]:
    """Black clips, and dark ones that show something."""
    image = picture(seed)
    rng = np.random.default_rng(seed)
    black = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    yield Case("black", black, True)
    yield Case("black with noise", rng.integers(0, 18, black.shape).astype(np.uint8), True)
    ends = np.concatenate([scaled(pan(image, 1.0, 18), np.linspace(1, 0, 18)), black[:42]])
    yield Case("fades to black early", ends, True)
    night = scaled(pan(image, 1.0), 0.05)
    for place in rng.integers(5, 120, (14, 2)):
        cv2_place = (int(place[1]) * 2, int(place[0]))
        for frame in night:
            cv2.circle(frame, cv2_place, 3, (200, 190, 120), -1)
    yield Case("night with lights", night, False)
    yield Case("dark scene", scaled(pan(image, 1.0), 0.3), False)
    yield Case("fade out at the end", scaled(pan(image, 1.0), np.linspace(1.2, 0, 60)), False)


def freeze_cases(seed: int) -> Iterator[Case]:
    """Clips that stop, and clips that only seem to."""
    image = picture(seed)
    moving = pan(image, 1.5)
    yield Case("stops", np.concatenate([moving[:36], still(moving[36], 24)]), True)
    yield Case("begins late", np.concatenate([still(moving[0], 18), moving[:42]]), True)
    yield Case("hangs twice", np.concatenate([moving[:14], still(moving[14], 16)] * 2), True)
    yield Case("never moves", still(image), True)
    dark = scaled(moving, 0.25)
    yield Case("stops, dark", np.concatenate([dark[:36], still(dark[36], 24)]), True)
    yield Case("small object", with_object(still(image), 12, 1.0, seed), False)
    yield Case("grain on a still", grainy(still(image), 8.0, seed), False)
    yield from clean_cases(seed)


def slideshow_cases(seed: int) -> Iterator[Case]:
    """Stills one after the other, and what is like that."""
    images = [picture(seed + 2 * k + 1) for k in range(3)]
    yield Case("cuts", np.concatenate([still(image, 20) for image in images]), True)
    joined = [still(images[0], 16), dissolve(still(images[0], 10), still(images[1], 10))]
    joined += [still(images[1], 16), dissolve(still(images[1], 10), still(images[2], 10))]
    yield Case("dissolves", np.concatenate([*joined, still(images[2], 16)]), True)
    soft = dissolve(still(images[1], 24), still(images[2], 24))
    yield Case(
        "long dissolve", np.concatenate([still(images[1], 20), soft, still(images[2], 20)]), True
    )
    moving = pan(images[0], 1.5)
    yield Case("one still", still(images[0]), False)
    stop = [still(moving[0], 16), moving[:28], still(moving[27], 16)]
    yield Case("stop, go, stop", np.concatenate(stop), False)
    shots = np.concatenate([pan(image, 1.0, 20) for image in images])
    yield Case("moving shots", shots, False)
    yield Case("time-lapse of 4 fps", repeated(pan(images[0], 4.0), 6), False)
    yield from clean_cases(seed)


def flicker_cases(seed: int) -> Iterator[Case]:
    """Lamps and shutters, and honest changes of light."""
    image = picture(seed)
    moving = pan(image, 1.0)
    k = np.arange(NUM_FRAMES)
    rng = np.random.default_rng(seed)
    yield Case("every other frame", scaled(moving, 1 + 0.04 * (-1.0) ** k), True)
    yield Case("8 Hz", scaled(moving, 1 + 0.06 * np.sin(2 * np.pi * 8 / FPS * k)), True)
    yield Case("random gain", scaled(moving, rng.normal(1, 0.04, NUM_FRAMES)), True)
    yield Case("strobe", scaled(moving, np.where(k % 6 == 0, 1.4, 0.9)), True)
    yield Case("slow light", scaled(moving, 1 + 0.3 * np.sin(2 * np.pi * 0.5 / FPS * k)), False)
    yield Case("object crosses", with_object(still(image), 60, 4.0, seed), False)
    fade = repeated(scaled(moving, np.linspace(0.2, 1, NUM_FRAMES)), 3)
    yield Case("fade of 8 fps", fade, False)
    yield from clean_cases(seed)


def text_cases(seed: int) -> Iterator[Case]:
    """Lines of text over pictures, and pictures full of detail."""
    image = picture(seed)
    yield Case("over a pan", with_text(pan(image, 1.0), seed), True)
    yield Case("over a still", with_text(still(image), seed + 100), True)
    yield Case("over a dark pan", with_text(scaled(pan(image, 1.0), 0.4), seed + 200), True)
    yield Case("over a fast pan", with_text(pan(image, 5.0), seed + 300), True)
    yield Case("still", still(drawn_picture(seed + 50)), False)
    leaves = np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH)).astype(np.float32)
    leaves = cv2.GaussianBlur(leaves, (0, 0), 2.5)
    blobs = np.where(leaves > 0, 200, 60).astype(np.uint8)
    yield Case("still blobs", still(np.repeat(blobs[..., None], 3, axis=2)), False)
    rails = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    rails[40:100, ::14] = rails[40:100, 1::14] = rails[40:100, 2::14] = 220
    yield Case("fence", pan(rails, 1.0), False)
    yield from clean_cases(seed)


def watermark_cases(seed: int) -> Iterator[Case]:
    """Signs in a corner, and straight lines that move along themselves."""
    image = picture(seed)
    for alpha in (0.9, 0.6, 0.4):
        yield Case(f"alpha {alpha}", with_watermark(pan(image, 2.0), seed, alpha), True)
    yield Case("slow pan below it", with_watermark(pan(image, 0.8), seed, 0.8), True)
    yield Case("fast pan below it", with_watermark(pan(image, 6.0), seed, 0.8), True)
    lines = drawn_picture(seed)
    lines[60:64] = 240
    lines[100:103] = 10
    frames = np.stack([shifted(lines, 2.0 * k) for k in range(NUM_FRAMES)])
    yield Case("horizon", frames, False)
    yield Case("tripod", with_object(still(image), 50, 3.0, seed), False)
    yield from clean_cases(seed)


CASES: dict[str, tuple[str, Callable[[int], Iterator[Case]]]] = {
    "black": ("black_fraction", black_cases),
    "freeze": ("freeze_fraction", freeze_cases),
    "slideshow": ("slideshow_fraction", slideshow_cases),
    "flicker": ("flicker", flicker_cases),
    "text overlay": ("text_area_fraction", text_cases),
    "watermark": ("static_overlay_fraction", watermark_cases),
}


# --- measuring ------------------------------------------------------------------------------------


def compressed(frames: np.ndarray, crf: int = CRF) -> np.ndarray:
    """The frames as they come out of an H.264 file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=int(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": str(crf)}
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def measure(frames: np.ndarray, fps: float = FPS) -> ClipScores:
    """All scores of a clip."""
    meter = ClipMeter(fps=fps, num_frames=len(frames))
    for frame in frames:
        meter.add(frame)
    return meter.scores()


def tally(score: str, threshold: float, cases: Sequence[Case]) -> tuple[Tally, list[str]]:
    """Count right and wrong answers; also return the wrong ones."""
    counts = collections.Counter()
    wrong: list[str] = []
    for case in cases:
        value = getattr(measure(compressed(case.frames)), score)
        found = value is not None and value > threshold
        counts[case.is_faulty, found] += 1
        if found != case.is_faulty:
            shown = "none" if value is None else f"{value:.4f}"
            wrong.append(f"{'missed' if case.is_faulty else 'false'}: {case.name} ({shown})")
    return (
        Tally(counts[True, True], counts[False, True], counts[True, False], counts[False, False]),
        wrong,
    )


# --- cuts and transitions -------------------------------------------------------------------------


class Edit(NamedTuple):
    """Shots joined in a known way: first and last frame of every joint."""

    name: str
    frames: np.ndarray
    joints: tuple[tuple[int, int], ...]


def cut_edits(seed: int) -> Iterator[Edit]:
    """Hard cuts, and fast motion without any."""
    shots = [pan(picture(seed + k), 1.0, 30) for k in range(3)]
    yield Edit("slow shots", np.concatenate(shots), ((30, 30), (60, 60)))
    fast = [pan(picture(seed + k), 6.0, 30) for k in range(3)]
    yield Edit("fast shots", np.concatenate(fast), ((30, 30), (60, 60)))
    dark = [scaled(shot, 0.4) for shot in shots]
    yield Edit("dark shots", np.concatenate(dark), ((30, 30), (60, 60)))
    held = [repeated(pan(picture(seed + k), 2.0, 30), 3) for k in range(3)]
    yield Edit("shots of 8 fps", np.concatenate(held), ((30, 30), (60, 60)))
    for step in (8.0, 16.0, 30.0):
        yield Edit(f"pan of {step:g} px", pan(picture(seed), step, 60), ())
    whip = np.cumsum(np.concatenate([np.zeros(20), np.linspace(0, 40, 10), np.linspace(40, 0, 10)]))
    image = picture(seed)
    yield Edit("whip pan", np.stack([shifted(image, float(x)) for x in whip]), ())
    yield Edit("8 fps", repeated(pan(image, 4.0, 60), 3), ())
    yield Edit("object", with_object(still(image), 70, 2.5, seed), ())


def transition_edits(seed: int) -> Iterator[Edit]:
    """Dissolves and fades, and changes that are none."""
    for length, step in ((10, 0.0), (12, 1.0), (24, 0.5), (24, 1.5), (40, 0.5)):
        before = pan(picture(seed), step, 30 + length)
        after = pan(picture(seed + 1), step, 30 + length)
        joint = dissolve(before[30:], after[:length])
        frames = np.concatenate([before[:30], joint, after[length:]])
        yield Edit(f"dissolve {length} frames, {step:g} px", frames, ((30, 29 + length),))
    for length in (8, 16, 30):
        before, after = (
            pan(picture(seed), 1.0, 30 + length),
            pan(picture(seed + 1), 1.0, 30 + length),
        )
        before = scaled(before, [1.0] * 30 + np.linspace(1, 0, length).tolist())
        after = scaled(after, np.linspace(0, 1, length).tolist() + [1.0] * 30)
        frames = np.concatenate([before, after])
        yield Edit(f"fade of 2 x {length} frames", frames, ((30, 29 + 2 * length),))
    image = picture(seed)
    gain = np.concatenate([np.ones(20), np.linspace(1, 0.55, 20), np.full(20, 0.55)])
    yield Edit("exposure falls", scaled(pan(image, 1.0), gain), ())
    for step in (0.5, 2.0, 6.0):
        yield Edit(f"pan of {step:g} px", pan(image, step, 72), ())
    zoom = [shifted(image, k, 0.6 * k, 1 + 0.015 * k) for k in range(72)]
    yield Edit("zoom", np.stack(zoom), ())
    yield Edit("object", with_object(pan(image, 0.5, 72), 90, 2.0, seed), ())
    yield Edit("grain", grainy(pan(image, 1.0, 72), 8.0, seed), ())


def boundaries(frames: np.ndarray, config: IngestionConfig) -> list[tuple[int, int]]:
    """What the detector of shots finds."""
    detector = ShotDetector(config)
    found = []
    for number, frame in enumerate(frames):
        found += detector.push(np.ascontiguousarray(frame[..., ::-1]), number / FPS)
    return [tuple(boundary) for boundary in found + detector.finish()]


def tally_edits(edits: Sequence[Edit], config: IngestionConfig) -> tuple[Tally, list[str]]:
    """Match joints with what was found; a joint is found if a boundary overlaps it."""
    counts = collections.Counter()
    wrong: list[str] = []
    for edit in edits:
        found = boundaries(compressed(edit.frames), config)
        left = set(found)
        missed = 0
        for start, stop in edit.joints:
            hits = {
                item
                for item in found
                if item[0] <= stop + CUT_TOLERANCE and item[1] >= start - CUT_TOLERANCE
            }
            counts["true"] += bool(hits)
            missed += not hits
            left -= hits
        counts["missed"] += missed
        counts["false"] += len(left)
        counts["clean"] += not edit.joints and not found
        if missed or left:
            wrong.append(f"{edit.name}: {edit.joints}, found {found}")
    return Tally(counts["true"], counts["false"], counts["missed"], counts["clean"]), wrong


# --- bars, duplicates, motion ---------------------------------------------------------------------


def bar_cases(seed: int) -> Iterator[tuple[str, np.ndarray, tuple[int, int, int, int]]]:
    """Clips, and the bars in them: left, top, right, bottom."""
    moving = pan(picture(seed), 1.5, 30)
    for rows in (3, 6, 10, 18, 26, 40):
        yield f"{rows} rows", with_bars(moving, rows), (0, rows, 0, rows)
    for columns in (8, 32, 60):
        yield f"{columns} columns", with_bars(moving, 0, columns), (columns, 0, columns, 0)
    yield "both", with_bars(moving, 14, 30), (30, 14, 30, 14)
    yield "grey bars", with_bars(moving, 18, level=14), (0, 18, 0, 18)
    dark = scaled(moving, 0.35)
    yield "dark scene in bars", with_bars(dark, 18), (0, 18, 0, 18)
    yield "still in bars", with_bars(still(picture(seed), 30), 18), (0, 18, 0, 18)
    none = (0, 0, 0, 0)
    yield "none", moving, none
    yield "dark scene", dark, none
    yield "very dark scene", scaled(moving, 0.12), none
    yield "black", np.zeros_like(moving), none
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    vignette = np.clip(1.3 - 1.1 * np.hypot(x, y), 0, 1)[None, :, :, None]
    yield "vignette", (moving * vignette).astype(np.uint8), none
    skyline = np.array(moving)
    roofs = 40 + (20 * np.sin(np.arange(WIDTH) / 7)).astype(int)
    for column, roof in enumerate(roofs):
        skyline[:, :roof, column] = 4
        skyline[:, HEIGHT - 20 :, column] = 4
    yield "night sky and street", skyline, none
    disc = cv2.circle(np.zeros((HEIGHT, WIDTH, 1), np.uint8), (128, 72), 50, 1, -1)
    yield "spotlight", moving * disc, none
    stage = np.array(moving)
    stage[:, :50] = 3
    yield "dark above only", stage, none
    late = np.concatenate([with_bars(moving[:15], 18), moving[15:]])
    yield "bars half of the time", late, none


def box_iou(found: Sequence[int], true: Sequence[int]) -> float:
    """Intersection over union of the boxes inside two sets of bars."""
    left, top = max(found[0], true[0]), max(found[1], true[1])
    right, bottom = max(found[2], true[2]), max(found[3], true[3])
    common = (WIDTH - left - right) * (HEIGHT - top - bottom)
    areas = [(WIDTH - b[0] - b[2]) * (HEIGHT - b[1] - b[3]) for b in (found, true)]
    return common / (sum(areas) - common)


def bars_of(frames: np.ndarray) -> tuple[int, int, int, int]:
    """The bars that are found in a clip."""
    brightest = None
    for frame in frames:
        brightest = brighter_of(brightest, frame)
    return tuple(find_bars(brightest))


def tally_bars(seeds: Sequence[int]) -> tuple[Tally, list[float], list[str]]:
    """Count bars found, with the overlap of the boxes of those that are there."""
    counts = collections.Counter()
    overlaps: list[float] = []
    wrong: list[str] = []
    for seed in seeds:
        for name, frames, true in bar_cases(seed):
            found = bars_of(compressed(frames))
            counts[any(true), any(found)] += 1
            if any(true) and any(found):
                overlaps.append(box_iou(found, true))
            if any(true) != any(found):
                wrong.append(f"{name}: {found}, expected {true}")
    return (
        Tally(counts[True, True], counts[False, True], counts[True, False], counts[False, False]),
        overlaps,
        wrong,
    )


class Copied(NamedTuple):
    """A clip, copies of it, and other clips of the same scene."""

    name: str
    original: np.ndarray
    copies: dict[str, np.ndarray]
    others: dict[str, np.ndarray]


def video_clip(index: int, first: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Frames of one of the videos in tests/data from `first` on, shape (T, HEIGHT, WIDTH, 3)."""
    path = sorted(VIDEOS.glob("*.mp4"))[index]
    with av.open(path.as_posix()) as container:
        frames = itertools.islice(container.decode(video=0), first, first + num_frames)
        size = {"format": "rgb24", "width": WIDTH, "height": HEIGHT}
        return np.stack([frame.to_ndarray(**size) for frame in frames])


def copies_of(frames: np.ndarray) -> dict[str, np.ndarray]:
    """What people do to a clip before they upload it once more."""
    count = len(frames)
    half = [cv2.resize(f, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA) for f in frames]
    return {
        "low rate": compressed(frames, 38),
        "half size, low rate": compressed(np.stack(half), 32),
        "darker": scaled(frames, 0.7),
        "recoloured": np.clip(1.15 * frames * [1.1, 1.0, 0.8], 0, 255).astype(np.uint8),
        "grain": grainy(frames, 8.0),
        "cropped by 2 %": frames[:, 2:-2, 2:-4],
        "cropped by 5 %": frames[:, 4:-4, 6:-8],
        "trimmed by 10 %": frames[count // 10 :],
        "trimmed by 20 %": frames[count // 10 : -(count // 10)],
        "1.25 times as fast": frames[(np.arange(int(count / 1.25)) * 1.25).astype(int)],
        "half as fast": np.repeat(frames, 2, axis=0),
    }


def copied_clips(seed: int) -> Iterator[Copied]:
    """Pans, an object, a zoom and a piece of a real video, with copies and other clips."""
    image = picture(seed)
    for step in (0.5, 2.0, 5.0):
        both = pan(image, step, 3 * NUM_FRAMES)
        # meets the other pan in its middle frame
        middle = step * (np.arange(NUM_FRAMES) - NUM_FRAMES // 2)
        way = step * (NUM_FRAMES // 2)
        crossing = [shifted(image, way - 0.3 * x, 0.3 * way + x) for x in middle]
        others = {
            "the pan goes on": both[NUM_FRAMES : 2 * NUM_FRAMES],
            "later": both[-NUM_FRAMES:],
            "another pan through the same place": np.stack(crossing),
        }
        original = both[:NUM_FRAMES]
        yield Copied(f"pan of {step:g} px", original, copies_of(original), others)
    ground = still(image)
    original = with_object(ground, 40, 2.0, seed)
    others = {
        "another small object": with_object(ground, 40, 3.0, seed + 1),
        "another large object": with_object(ground, 100, 2.0, seed + 1),
    }
    yield Copied("object", original, copies_of(original), others)
    zoom = [shifted(image, 0.3 * k, 0.2 * k, 1 + 0.008 * k) for k in range(2 * NUM_FRAMES)]
    original = np.stack(zoom[:NUM_FRAMES])
    others = {"the zoom goes on": np.stack(zoom[NUM_FRAMES:])}
    yield Copied("zoom", original, copies_of(original), others)
    index = seed % NUM_VIDEOS
    original = video_clip(index, 10 * (seed // NUM_VIDEOS))
    others = {"the next seconds": video_clip(index, 10 * (seed // NUM_VIDEOS) + NUM_FRAMES)}
    yield Copied("video", original, copies_of(original), others)


def hash_of(frames: np.ndarray, places: Sequence[int] | None = None) -> str:
    """The perceptual hash of a clip, as it is measured, or of some of its frames."""
    chosen = frames[hashed_frames(len(frames)) if places is None else places]
    return "".join(perceptual_hash(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY)) for one in chosen)


def middle_of(text: str) -> str:
    """The hash of the middle frame alone."""
    middle = HASH_DIGITS * (len(text) // HASH_DIGITS // 2)
    return text[middle : middle + HASH_DIGITS]


class Duplicates(NamedTuple):
    """Counts of one way to tell copies, by their kind: how many, and how many were found."""

    copies: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, int]]

    def tally(self) -> Tally:
        """Counts over all kinds."""
        total, found = np.sum(list(self.copies.values()), axis=0).tolist()
        num_others, num_false = np.sum(list(self.others.values()), axis=0).tolist()
        return Tally(found, num_false, total - found, num_others - num_false)


def tally_duplicates(
    pairs: Sequence[tuple[bool, str, str, str]], max_distance: int, *, middle_only: bool
) -> Duplicates:
    """Count which pairs of hashes are near: whether they are copies, their kind and both hashes."""
    counts: tuple[dict, dict] = ({}, {})
    for is_copy, kind, one, other in pairs:
        hashes = [middle_of(one), middle_of(other)] if middle_only else [one, other]
        likeness = find_likeness(hashes, max_distance)
        is_near = len(set(find_clusters(likeness).tolist())) == 1
        total, found = counts[not is_copy].get(kind, (0, 0))
        counts[not is_copy][kind] = (total + 1, found + is_near)
    return Duplicates(*counts)


def duplicate_pairs(seeds: Sequence[int]) -> list[tuple[bool, str, str, str]]:
    """Copies, clips of the same scene, and clips of different scenes, with their hashes."""
    pairs = []
    originals = []
    for seed in seeds:
        for item in copied_clips(seed):
            one = hash_of(compressed(item.original))
            originals.append((seed, item.name, one))
            for kind, frames in item.copies.items():
                pairs.append((True, f"{item.name}: {kind}", one, hash_of(compressed(frames))))
            for kind, frames in item.others.items():
                name = f"same scene, {item.name}: {kind}"
                pairs.append((False, name, one, hash_of(compressed(frames))))
    for index, (seed, name, one) in enumerate(originals):
        for other_seed, other_name, other in originals[:index]:
            # clips of a seed, and of two seeds with frames of one video, show one picture
            if (seed - other_seed) % NUM_VIDEOS and "video" not in {name, other_name}:
                pairs.append((False, "other scene", one, other))
    return pairs


# --- long takes -----------------------------------------------------------------------------------

TAKE_S = 12
LONGEST_S = (5.0, 10.0)
TAKE_WIDTH, TAKE_HEIGHT = 320, 180


def wide_picture(seed: int, width: int) -> np.ndarray:
    """A drawn picture, or frames of the videos side by side."""
    if seed % 2:
        return drawn_picture(seed, height=TAKE_HEIGHT, width=width)
    size = (TAKE_WIDTH, TAKE_HEIGHT)
    number = -(-width // TAKE_WIDTH)
    parts = [cv2.resize(video_frame(seed // 2 + part), size) for part in range(number)]
    return np.concatenate(parts, axis=1)[:, :width]


def view(image: np.ndarray, x: float, y: float = 0.0, zoom: float = 1.0) -> np.ndarray:
    """What a camera of 320 x 180 px sees of a picture."""
    matrix = np.array([[zoom, 0, -x], [0, zoom, -y]], np.float32)
    size = (TAKE_WIDTH, TAKE_HEIGHT)
    return cv2.warpAffine(
        image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )


def pan_take(image: np.ndarray, speed: float, first_s: float, last_s: float) -> np.ndarray:
    """A camera that moves by `speed` px a second, between two times."""
    times = np.arange(round(first_s * FPS), round(last_s * FPS)) / FPS
    return np.stack([view(image, speed * t) for t in times])


def takes(seed: int) -> Iterator[Copied]:
    """Long takes, with other footage that is like them."""
    for speed in (3, 12, 24, 48, 96):
        image = wide_picture(seed, 2 * speed * TAKE_S + TAKE_WIDTH + 200)
        take = pan_take(image, speed, 0, TAKE_S)
        centre = speed * TAKE_S / 2
        crossing = np.stack(
            [view(image, centre, 1.5 * speed * (k / FPS - TAKE_S / 2)) for k in range(len(take))]
        )
        others = {
            "the pan goes on": pan_take(image, speed, TAKE_S, 2 * TAKE_S),
            "the pan, backwards": take[::-1],
            "another pan through the same place": crossing,
            "the same pan, a fifth of the picture lower": np.stack(
                [view(image, speed * k / FPS, 36) for k in range(len(take))]
            ),
        }
        yield Copied(f"pan of {speed} px/s", take, {}, others)
    rng = np.random.default_rng(seed)
    image = wide_picture(seed, 2 * TAKE_WIDTH)
    for name, reach in (("camera in the hand", 12.0), ("camera that wanders", 60.0)):
        steps = rng.normal(size=(2, 2 * TAKE_S * int(FPS)))
        ways = np.stack([cv2.GaussianBlur(row[None], (0, 0), FPS / 2)[0] for row in steps])
        ways *= reach / ways.std()
        both = np.stack([view(image, TAKE_WIDTH / 2 + x, y / 2) for x, y in ways.T])
        half = len(both) // 2
        yield Copied(name, both[:half], {}, {"the next seconds": both[half:]})
    zoom = np.stack(
        [view(image, 4.0 * t, 3.0 * t, 1 + 0.05 * t) for t in np.arange(0, 2 * TAKE_S, 1 / FPS)]
    )
    half = len(zoom) // 2
    yield Copied("zoom", zoom[:half], {}, {"the zoom goes on": zoom[half:]})
    number = round(TAKE_S * FPS)
    stood = np.repeat(view(image, 40)[None], number, axis=0)
    yield Copied("still", stood, {}, {})
    ways = [[(rng.uniform(0, 80), rng.uniform(1, 3)) for _ in range(2)] for _ in range(2)]
    moved = [with_objects(stood, way, seed + place) for place, way in enumerate(ways)]
    others = {"other objects before the same ground": moved[1]}
    yield Copied("objects before a still ground", moved[0], {}, others)


def with_objects(
    frames: np.ndarray, ways: Sequence[tuple[float, float]], seed: int, side: int = 60
) -> np.ndarray:
    """Frames over which textured squares move to and fro."""
    out = frames.copy()
    for place, (first, step) in enumerate(ways):
        patch = drawn_picture(seed + 50 + place, height=side, width=side)
        reach = TAKE_WIDTH - side
        for k, frame in enumerate(out):
            x = int(abs((first + step * k) % (2 * reach) - reach))
            frame[20 + 80 * place : 20 + 80 * place + side, x : x + side] = patch
    return out


def take_copies(frames: np.ndarray) -> dict[str, np.ndarray]:
    """What is made of a long take before it is uploaded once more."""
    small = np.stack([cv2.resize(f, (160, 90), interpolation=cv2.INTER_AREA) for f in frames[30:]])
    later = frames[41:]
    copies = {
        f"without the first {s:g} s": compressed(frames[round(s * FPS) :], 30)
        for s in (0.5, 1, 1.7, 2.5, 3.3, 5)
    }
    copies |= {
        f"{s:g} s around second {centre}": compressed(
            frames[round((centre - s / 2) * FPS) :][: round(s * FPS)]
        )
        for s in (1.3, 1.6, 1.9)
        for centre in (4, 6)  # borders of clips of 5 s and of 10 s
    }
    return copies | {
        "both ends trimmed": compressed(frames[55:-50], 30),
        "low rate, trimmed": compressed(later, 38),
        "half size, low rate, trimmed": compressed(small, 32),
        "recoloured, trimmed": compressed(
            np.clip(1.15 * later * [1.1, 1.0, 0.8], 0, 255).astype(np.uint8)
        ),
        "cropped by 2 %, trimmed": compressed(later[:, 2:-2, 4:-4]),
        "12 frames a second, trimmed": compressed(np.repeat(later[::2], 2, axis=0)),
        "25 instead of 24 frames a second, trimmed": compressed(
            later[(np.arange(int(len(later) / 25 * 24)) * 25 / 24).astype(int)]
        ),
        "1.25 times as fast, trimmed": compressed(
            later[(np.arange(int(len(later) / 1.25)) * 1.25).astype(int)]
        ),
    }


class CutTake(NamedTuple):
    """The clips of a take, as hashes."""

    nine: list[str]
    dense: list[bytes]
    spans_s: list[tuple[float, float]]


def cut_take(frames: np.ndarray, longest_s: float) -> CutTake:
    """Cut a take as it is at ingestion, and hash its clips."""
    nine, dense, spans_s = [], [], []
    for start, stop in cut_spans(len(frames), round(1.2 * FPS), round(longest_s * FPS)):
        clip = frames[start:stop]
        nine.append(hash_of(clip))
        dense.append(bytes.fromhex(hash_of(clip, footage_frames(len(clip), FPS))))
        spans_s.append((start / FPS, stop / FPS))
    return CutTake(nine, dense, spans_s)


def are_joined(one: CutTake, other: CutTake, bits: int) -> tuple[bool, bool]:
    """Whether two takes are joined by near-duplicates alone, and by footage as well."""
    clusters = find_clusters(find_likeness([*one.nine, *other.nine], bits))
    count = len(one.nine)
    by_nine = bool(set(clusters[:count].tolist()) & set(clusters[count:].tolist()))
    frames = lay_out(
        ClipHashes(source, start_s, end_s, hashes)
        for source, take in enumerate((one, other))
        for (start_s, end_s), hashes in zip(take.spans_s, take.dense, strict=True)
    )
    groups = join_by_footage(frames, np.arange(2), bits)
    return by_nine, by_nine or bool(groups[0] == groups[1])


class TakePair(NamedTuple):
    """Two takes, what they are, and what they are to each other."""

    is_copy: bool
    take: str
    kind: str
    one: np.ndarray
    other: np.ndarray


def take_pairs(seeds: Sequence[int]) -> Iterator[TakePair]:
    """Takes with their copies, with other footage of the same scene and with other scenes."""
    originals: list[tuple[int, np.ndarray]] = []
    pans: list[np.ndarray] = []
    for seed in seeds:
        for item in takes(seed):
            original = compressed(item.original)
            for kind, frames in take_copies(item.original).items():
                yield TakePair(True, item.name, kind, original, frames)
            for kind, frames in item.others.items():
                yield TakePair(False, item.name, kind, original, compressed(frames))
            originals.append((seed, original))
            if item.name == "pan of 24 px/s":
                pans.append(item.original)
    for (seed, one), (other_seed, other) in itertools.combinations(originals, 2):
        if (seed - other_seed) % 2:  # else both may show frames of one video
            yield TakePair(False, "", "another scene", one, other)
    title = drawn_picture(900, height=TAKE_HEIGHT, width=2 * TAKE_WIDTH)
    for first, second in itertools.combinations(pans, 2):
        for seconds in (1, 2, 4):
            both = [
                compressed(np.concatenate([pan_take(title, 60, 0, seconds), take]))
                for take in (first, second)
            ]
            yield TakePair(False, "", f"{seconds} s of a title runs into the take", *both)


def report_footage(seeds: Sequence[int]) -> None:
    """Print how many takes are joined with what is and what is not a copy of them."""
    counts: dict[str, np.ndarray] = {}
    wrong: collections.Counter[str] = collections.Counter()
    for pair in take_pairs(seeds):
        for longest_s in LONGEST_S:
            cut = cut_take(pair.one, longest_s), cut_take(pair.other, longest_s)
            found = [way for bits in (4, HASH_BITS, 8) for way in are_joined(*cut, bits)]
            counts[pair.kind] = counts.get(pair.kind, 0) + np.array([1, *found])
            if found[1] != pair.is_copy:
                wrong[f"{pair.kind}, {pair.take}"] += 1
    head = "".join(f" nine, {b} bits | footage, {b} bits |" for b in (4, HASH_BITS, 8))
    print(f"| pair | number |{head}")
    print("|---|---|---|---|---|---|---|---|")
    for kind, numbers in counts.items():
        print(f"| {kind} | " + " | ".join(map(str, numbers.tolist())) + " |")
    print()
    for line, number in wrong.items():
        print(f"- wrong at 4 bits: {line}: {number}")


def motion_speeds(seeds: Sequence[int]) -> tuple[list[float], dict[str, list[float]]]:
    """True speeds of pans, px/s, and what is measured."""
    true: list[float] = []
    measured = collections.defaultdict(list)
    for seed in seeds:
        for step in (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            scores = measure(compressed(pan(picture(seed), step, 24)))
            true.append(step * np.hypot(1, 0.3) * FPS)
            for name in ("motion", "camera_motion", "object_motion"):
                measured[name].append(getattr(scores, f"{name}_px_per_s"))
    return true, measured


def object_speeds(seeds: Sequence[int]) -> tuple[list[float], dict[str, list[float]]]:
    """True speeds of an object, averaged over the picture, before a camera that pans at 24 px/s."""
    side = 60
    true: list[float] = []
    measured = collections.defaultdict(list)
    for seed in seeds:
        for step in (0.0, 1.0, 2.0, 3.0, 4.0):
            ground = np.stack([shifted(picture(seed), k) for k in range(24)])
            scores = measure(compressed(with_object(ground, side, step, seed + 1)))
            # the object moves to the right, the picture to the left
            true.append((step + 1.0) * FPS * side * side / (WIDTH * HEIGHT))
            for name in ("camera_motion", "object_motion"):
                measured[name].append(getattr(scores, f"{name}_px_per_s"))
    return true, measured


def distinct_rates(seeds: Sequence[int]) -> list[tuple[float, float]]:
    """True rates of distinct frames, and what is measured."""
    pairs = []
    for seed in seeds:
        for times in (1, 2, 3, 4, 6):
            frames = compressed(repeated(pan(picture(seed), 1.0), times))
            pairs.append((FPS / times, measure(frames).distinct_fps or 0.0))
    return pairs


# --- the report -----------------------------------------------------------------------------------


def row(name: str, threshold: str, result: Tally, note: str = "") -> str:
    """A line of the table."""
    return (
        f"| {name} | {threshold} | {result.true_found + result.missed} | "
        f"{result.false_found + result.clean} | {result.precision:.3f} | {result.recall:.3f} | "
        f"{note} |"
    )


def report(seeds: Sequence[int]) -> None:
    """Print the tables."""
    config = load_config("tiny").ingestion
    faults: dict[str, list[str]] = {}
    print("| what | threshold | with | without | precision | recall | |")
    print("|---|---|---|---|---|---|---|")
    for name, edits in (("hard cuts", cut_edits), ("dissolves and fades", transition_edits)):
        result, faults[name] = tally_edits([e for seed in seeds for e in edits(seed)], config)
        print(row(name, "preset", result, "without: clips that stay whole"))
    result, overlaps, faults["bars"] = tally_bars(seeds)
    note = f"IoU of the box: mean {np.mean(overlaps):.3f}, least {min(overlaps):.3f}"
    print(row("letterbox and pillarbox", "fixed", result, note))
    for name, (score, make) in CASES.items():
        cases = [case for seed in seeds for case in make(seed)]
        result, faults[name] = tally(score, THRESHOLDS[score], cases)
        print(row(name, f"`{score}` > {THRESHOLDS[score]:g}", result))
    report_duplicates(seeds)
    speeds, measured = motion_speeds(seeds)
    print("| score | against | Spearman | median ratio |")
    print("|---|---|---|---|")
    for name in ("motion", "camera_motion"):
        rank = spearmanr(speeds, measured[name]).statistic
        ratio = np.median(np.divide(measured[name], speeds))
        print(f"| `{name}_px_per_s` | speed of a pan | {rank:.3f} | {ratio:.2f} |")
    share = np.median(np.divide(measured["object_motion"], speeds))
    print(f"| `object_motion_px_per_s` | speed of a pan: should be 0 | | {share:.2f} |")
    speeds, measured = object_speeds(seeds)
    rank = spearmanr(speeds, measured["object_motion"]).statistic
    ratio = np.median(np.divide(measured["object_motion"], speeds))
    print(f"| `object_motion_px_per_s` | an object over a pan | {rank:.3f} | {ratio:.2f} |")
    pairs = distinct_rates(seeds)
    error = np.abs(np.array([found - true for true, found in pairs]))
    print(f"| `distinct_fps` | rate | mean error {error.mean():.2f} | worst {error.max():.2f} |")
    print()
    for name, lines in faults.items():
        for line, count in collections.Counter(lines).items():
            print(f"- {name}: {line}" + (f" x {count}" if count > 1 else ""))


def report_duplicates(seeds: Sequence[int]) -> None:
    """Print the tables of near-duplicates: by distance, and by kind at `HASH_BITS`."""
    pairs = duplicate_pairs(seeds)
    for middle_only in (True, False):
        frames = "the middle frame" if middle_only else "most of nine frames"
        for bits in (4, HASH_BITS, 8):
            found = tally_duplicates(pairs, bits, middle_only=middle_only)
            threshold = f"`max_duplicate_distance` {bits}"
            print(row(f"duplicates, {frames}", threshold, found.tally()))
    print()
    ways = [tally_duplicates(pairs, HASH_BITS, middle_only=way) for way in (True, False)]
    print("| pair | number | near by the middle frame | near by most of nine |")
    print("|---|---|---|---|")
    for name in ("copies", "others"):
        middle, most = (_by_last_word(getattr(way, name)) for way in ways)
        for kind, (number, found_in_middle) in middle.items():
            print(f"| {kind} | {number} | {found_in_middle} | {most[kind][1]} |")
    print()


def _by_last_word(counts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Add up counts over all originals."""
    total: dict[str, tuple[int, int]] = {}
    for name, (number, found) in counts.items():
        kind = name.rpartition(": ")[2]
        before = total.get(kind, (0, 0))
        total[kind] = (before[0] + number, before[1] + found)
    return total


def cost(num_frames: int = 240) -> None:
    """Print the time a frame takes, in one thread."""
    cv2.setNumThreads(1)
    image = cv2.resize(drawn_picture(1), (320, 180))
    frames = np.stack([shifted(image, 1.0 * k) for k in range(num_frames)])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        measure(frames)
        times.append((time.perf_counter() - start) / num_frames)
    print(f"{1000 * min(times):.2f} ms a frame of 320 x 180 px at 24 frames per second")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description="How well the scores of a clip do.")
    parser.add_argument("--seeds", type=int, default=6, help="sets of pictures")
    parser.add_argument("--duplicates", action="store_true", help="only those of near-duplicates")
    parser.add_argument("--footage", action="store_true", help="only long takes and their copies")
    parser.add_argument("--cost", action="store_true", help="only the time a frame takes")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.cost:
        cost()
    elif options.footage:
        report_footage(range(options.seeds))
    elif options.duplicates:
        report_duplicates(range(options.seeds))
    else:
        report(range(options.seeds))


if __name__ == "__main__":
    main()
