"""Buckets: which size of samples a clip is cut into, so that no shape of picture is cropped away.

Every clip goes to exactly one bucket. The choice is a pure function of the clip and the settings.
"""

from collections.abc import Sequence

from ursa.artifacts import Clip
from ursa.config import SampleSize, TokenizationConfig

_SAME = 0.05
"""Shares of the picture that differ by less count as equal."""


def sample_sizes(settings: TokenizationConfig) -> tuple[SampleSize, ...]:
    """Return the sizes of all buckets: the main one first, then `extra_buckets`.

    Args:
        settings: Sizes of samples.
    """
    main = SampleSize(
        num_frames=settings.num_frames, height_px=settings.height_px, width_px=settings.width_px
    )
    return (main, *settings.extra_buckets)


def bucket_settings(settings: TokenizationConfig, bucket: int) -> TokenizationConfig:
    """Return the settings of one bucket: its size, and no further ones.

    Args:
        settings: Sizes of samples.
        bucket: Number of the bucket; 0 is the main one.
    """
    size = sample_sizes(settings)[bucket]
    return settings.model_copy(update={**size.model_dump(), "extra_buckets": ()})


def choose_bucket(clip: Clip, settings: TokenizationConfig) -> int:
    """Return the bucket of a clip.

    Of the buckets whose samples the clip is long enough for it is the one that keeps most of the
    picture; of those that keep as much, the largest that needs no enlarging (or the smallest, if
    all do); then the longest; then the first. A clip too short for every bucket is chosen for by
    its picture alone: it gives images.

    Args:
        clip: A normalised clip.
        settings: Sizes of samples.
    """
    sizes = sample_sizes(settings)
    fitting = [place for place, size in enumerate(sizes) if _holds(clip, size, settings.fps)]
    places = fitting or range(len(sizes))
    best = max(kept_share(clip, sizes[place]) for place in places)
    places = [place for place in places if kept_share(clip, sizes[place]) > best - _SAME]
    return max(places, key=lambda place: _preference(clip, sizes, place))


def kept_share(clip: Clip, size: SampleSize) -> float:
    """Return the share of the picture that is left when a clip is cropped to a shape, in (0, 1].

    Args:
        clip: A normalised clip.
        size: A bucket.
    """
    own = clip.info.width_px / clip.info.height_px
    wanted = size.width_px / size.height_px
    return min(own / wanted, wanted / own)


def _holds(clip: Clip, size: SampleSize, fps: float) -> bool:
    """Whether the clip has a sample of the bucket; the same arithmetic as `clip_windows`."""
    last = round((size.num_frames - 1) * (clip.info.fps / fps))
    return last < clip.info.num_frames


def _preference(clip: Clip, sizes: Sequence[SampleSize], place: int) -> tuple[bool, int, int, int]:
    size = sizes[place]
    area = size.height_px * size.width_px
    # the part of the picture that is left after cropping to the shape of the bucket
    height = min(clip.info.height_px, clip.info.width_px * size.height_px / size.width_px)
    is_sharp = height >= size.height_px
    return is_sharp, area if is_sharp else -area, size.num_frames, -place
