"""Real windows of clips: what samples are compared with, and what image-to-video begins with."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ursa.artifacts import MeasuredCases, SelectedClip, Split
from ursa.bootstrap import footage_spans
from ursa.config import RunConfig, TokenizationConfig
from ursa.data.clips import clip_windows, local_clip
from ursa.data.dataset import spread
from ursa.errors import VideoDecodeError
from ursa.evaluation.measures import group_cases
from ursa.video.decode import FrameSize, ReadFrames

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """A real sample.

    Attributes:
        name: Clip and start.
        clip_id: The clip.
        start_s: Where it begins in the clip, seconds.
        source_id: sha256 of its source.
        caption: What is said of it.
        frames: uint8 (F, H, W, 3).
    """

    name: str
    clip_id: str
    start_s: float
    source_id: str
    caption: str
    frames: np.ndarray


def iter_windows(
    selected: Sequence[SelectedClip],
    split: Split,
    config: RunConfig,
    read: ReadFrames,
    *,
    limit: int,
) -> Iterator[Window]:
    """Yield windows of a split, evenly spread; each clip is decoded once.

    Args:
        selected: Clips; those that cannot be read are left out.
        split: "train" or "validation".
        config: The run; `tokenization` matters.
        read: Reads frames of a local file.
        limit: Windows at most.

    Yields:
        Windows, clip by clip.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    found = [
        (item, start_s, indices)
        for item in selected
        if item.split == split
        for start_s, indices in clip_windows(item.clip, config.tokenization)
    ]
    by_clip: defaultdict[str, list[tuple[SelectedClip, float, list[int]]]] = defaultdict(list)
    for place in spread(len(found), limit):
        by_clip[found[place][0].clip.clip_id].append(found[place])
    for chosen in by_clip.values():
        item = chosen[0][0]
        wanted = sorted({index for _, _, indices in chosen for index in indices})
        frames = read_window(item, wanted, config, read)
        if frames is None:
            continue
        for _, start_s, indices in chosen:
            yield Window(
                name=f"{item.clip.clip_id}@{start_s:.3f}",
                clip_id=item.clip.clip_id,
                start_s=start_s,
                source_id=item.clip.source_sha256,
                caption=item.clip.caption or "",
                frames=frames[np.searchsorted(wanted, indices)],
            )


def group_windows(
    name: str, windows: Sequence[Window], config: TokenizationConfig
) -> MeasuredCases:
    """Return windows as cases of metrics.

    Args:
        name: Of the group.
        windows: The windows.
        config: Their rate and length.
    """
    clips = [window.clip_id for window in windows]
    spans = footage_spans(
        clips, [window.start_s for window in windows], window_s=config.num_frames / config.fps
    )
    return group_cases(
        name,
        [window.name for window in windows],
        (
            ("source", [window.source_id for window in windows]),
            ("clip", clips),
            ("span", spans),
        ),
    )


def read_window(
    item: SelectedClip, indices: Sequence[int], config: RunConfig, read: ReadFrames
) -> np.ndarray | None:
    """Return frames of a clip; None if it cannot be read, as tokenization may have found too.

    Args:
        item: The clip.
        indices: Frame numbers.
        config: The run; `tokenization` matters.
        read: Reads frames of a local file.

    Returns:
        uint8 (len(indices), height_px, width_px, 3), or None.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    size = FrameSize(config.tokenization.height_px, config.tokenization.width_px)
    try:
        with local_clip(item.clip) as path:
            return read(path, indices, [size])[0]
    except VideoDecodeError as error:
        logger.warning("left out of the evaluation: %s", error)
        return None
