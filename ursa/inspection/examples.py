"""Example clips to look at: whole, or as a strip of frames."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from ursa.artifacts import Clip, ClipSelection, RejectReason, SelectedClip
from ursa.data.clips import clips_of, local_clip, read_selection_tables
from ursa.errors import ConfigError, DataError, name_hint
from ursa.video.decode import FrameSize, ReadFrames, read_frames_at
from ursa.video.reader import ClipReader

STRIP_FRAMES = 4
STRIP_HEIGHT_PX = 90


def choose_examples(
    selection: ClipSelection, number: int, *, kept: bool | None = None, reason: str | None = None
) -> list[SelectedClip]:
    """Return clips of a kind, evenly spread over all of them, so the same every time.

    Args:
        selection: The committed selection.
        number: How many at most.
        kept: Kept or rejected ones; None takes both.
        reason: Rejected for this reason alone.

    Raises:
        ConfigError: If there is no such reason, or the number is less than 1.
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    known = sorted({*(item.value for item in RejectReason), *selection.rejections})
    if reason is not None and reason not in known:
        raise ConfigError(f"there is no reason {reason!r}; {name_hint(reason, known)}")
    if number < 1:
        raise ConfigError(f"the number of examples must be at least 1, got {number}")
    clips, verdicts = read_selection_tables(selection)
    chosen = np.ones(clips.num_rows, bool)
    if kept is not None:
        chosen &= verdicts["kept"].to_numpy() == kept
    if reason is not None:
        chosen &= pc.fill_null(pc.equal(verdicts["reason"], reason), fill_value=False).to_numpy()
    rows = np.flatnonzero(chosen)
    count = min(number, len(rows))
    rows = rows[[place * len(rows) // count for place in range(count)]]
    return [
        SelectedClip(clip=clip, kept=row["kept"], reason=row["reason"], split=row["split"])
        for clip, row in zip(
            clips_of(clips.take(rows)), verdicts.take(rows).to_pylist(), strict=True
        )
    ]


def write_examples(
    examples: Sequence[SelectedClip], folder: Path, *, as_strips: bool = False
) -> list[Path]:
    """Copy clips into a folder, one below it for each verdict, with `examples.json` beside them.

    Args:
        examples: What to copy.
        folder: Where it goes; made if missing, files of the same names are replaced.
        as_strips: Write strips of frames as PNG instead of clips.

    Returns:
        The files, in the order of the examples.

    Raises:
        DataError: If a clip is missing or damaged, or the folder cannot be written.
        StorageError: If the store refuses or does not answer.
    """
    paths = []
    rows = []
    reader = ClipReader()
    for item in examples:
        # a name from a table is not trusted to be one
        name = re.sub(r"[^0-9A-Za-z_-]", "_", item.clip.clip_id)
        verdict = re.sub(r"[^0-9A-Za-z_.-]", "_", verdict_of(item)).lstrip(".")
        path = folder / verdict / f"{name}{'.png' if as_strips else '.mp4'}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if as_strips:
                Image.fromarray(read_strip(item.clip, reader.read)).save(path)
            else:
                with local_clip(item.clip) as media:
                    shutil.copyfile(media, path)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error}); choose another folder") from error
        paths.append(path)
        rows.append({"file": path.relative_to(folder).as_posix(), **item.model_dump(mode="json")})
    if rows:
        (folder / "examples.json").write_text(json.dumps(rows, indent=1), "utf-8")
    return paths


def verdict_of(item: SelectedClip) -> str:
    """Return "kept" or the reason.

    Args:
        item: A clip and the verdict on it.
    """
    return "kept" if item.kept else str(item.reason)


def read_strip(
    clip: Clip,
    read: ReadFrames = read_frames_at,
    *,
    num_frames: int = STRIP_FRAMES,
    height_px: int = STRIP_HEIGHT_PX,
) -> np.ndarray:
    """Return frames of a clip side by side, evenly spread from the first to the last.

    Args:
        clip: A normalised clip.
        read: Reads frames of a local file.
        num_frames: How many at most.
        height_px: Height of the strip.

    Returns:
        RGB picture, shape (height_px, about num_frames * width, 3), uint8.

    Raises:
        VideoDecodeError: If the clip is missing, damaged or cannot be read.
        StorageError: If the store refuses or does not answer.
    """
    info = clip.info
    width_px = max(1, round(height_px * info.width_px / info.height_px))
    places = np.linspace(0, info.num_frames - 1, min(num_frames, info.num_frames))
    indices = [round(place) for place in places.tolist()]
    with local_clip(clip) as path:
        (frames,) = read(path, indices, [FrameSize(height_px, width_px)])
    return np.concatenate(list(frames), axis=1)
