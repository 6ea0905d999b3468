"""A source of many clips that were never decoded: tiny files, and records as if they were videos.

It imports nothing that decodes or trains, so that a process that uses it holds what the data steps
need and nothing else.
"""

import hashlib
import random
from pathlib import Path

from ursa import ingestion, storage
from ursa.artifacts import Clip, ClipScores, IngestedVideo, SourceVideo, VideoInfo
from ursa.config import IngestionConfig, load_config

CONFIG = load_config("tiny")
_INFO = VideoInfo(
    width_px=320, height_px=180, fps=24.0, num_frames=120, duration_s=5.0, codec="h264"
)


def write_videos(
    source: Path, data_uri: str, num_files: int, *, clips_a_file: int = 10, first: int = 0
) -> None:
    """Write files and their units; numbers from `first` on decide names and content."""
    source.mkdir(exist_ok=True)
    for number in range(first, first + num_files):
        path = source / f"video {number:06d}.mp4"
        path.write_bytes(b"%d" % number)
        video = video_of(path, data_uri, number, clips_a_file)
        uri = ingestion._unit_uri(data_uri, video.source, config())
        storage.commit_record(uri, video)


def config() -> IngestionConfig:
    """The configuration of the units."""
    return CONFIG.ingestion


def video_of(path: Path, data_uri: str, number: int, num_clips: int) -> IngestedVideo:
    """Return what would have become of a file: clips that are kept, and no two alike."""
    chance = random.Random(number)
    content = hashlib.sha256(b"%d" % number).hexdigest()
    source = SourceVideo(uri=path.as_uri(), num_bytes=len(str(number)), etag=content)
    clips = tuple(_clip(source, data_uri, place, chance) for place in range(num_clips))
    return IngestedVideo(
        source=source, source_sha256=content, info=_INFO, clips=clips, failure=None
    )


def _clip(source: SourceVideo, data_uri: str, place: int, chance: random.Random) -> Clip:
    scores = {name: chance.random() / 1000 for name in ClipScores.model_fields}
    scores |= {
        "motion_px_per_s": 10 + chance.random(),
        "sharpness": 50 + chance.random(),
        "luminance": 100 + chance.random(),
        "distinct_fps": 24.0,
        "perceptual_hash": f"{chance.getrandbits(576):0144x}",
        "frame_hashes": chance.randbytes(8 * 40),
    }
    clip_id, media = f"{chance.getrandbits(128):032x}", f"{chance.getrandbits(256):064x}"
    return Clip(
        clip_id=clip_id,
        source_uri=source.uri,
        source_sha256=source.etag,
        start_s=place * 5.0,
        end_s=place * 5.0 + 5,
        media_uri=f"{data_uri}/clips/media/{clip_id}-{media[:16]}.mp4",
        media_sha256=media,
        info=_INFO,
        scores=ClipScores(**scores),
    )
