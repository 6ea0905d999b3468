"""A whole data root, made by the real steps from synthetic videos in some seconds."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests import factories, media
from ursa import ingestion, storage
from ursa.artifacts import ClipSelection, ShardInfo, TokenDatasets, TokenizerRef
from ursa.config import RunConfig
from ursa.data.shards import read_shard
from ursa.sources.listing import discover_videos
from ursa.tokenization import ClipTokenizer, commit_tokens, plan_tokenization

CAPTION = '<script>alert("x")</script> & a pan'


class DataRoot(NamedTuple):
    """Where it is and what is in it."""

    uri: str
    source: Path
    config: RunConfig
    selection: ClipSelection
    datasets: TokenDatasets

    def files(self) -> dict[str, tuple[str, int]]:
        """Hash and time of writing of every file below the root."""
        return {
            item.uri: (item.etag, storage.local_path(item.uri).stat().st_mtime_ns)
            for item in storage.list_files(self.uri)
        }

    def shards(self) -> list[Path]:
        return sorted((Path(self.uri) / "tokens" / "shards").iterdir())

    def media(self) -> list[Path]:
        return sorted((Path(self.uri) / "clips" / "media").iterdir())


def root_config(**changes) -> RunConfig:
    """The configuration of `write_data_root`."""
    ingestion_values = media.ingestion_config(max_clip_s=1.5).model_dump()
    return factories.tiny_config(
        {"ingestion": ingestion_values, "tokenization": {"clips_per_shard": 3}, **changes}
    )


def write_source(folder: Path) -> Path:
    """Two panning videos with captions, a dark one, and a file that is none."""
    folder.mkdir()
    for index, name in enumerate(("pan.mp4", "<b>pan & scan.mp4")):
        frames = media.panning(72, step=2, height=96, width=128, seed=index)
        media.save_video(folder / name, frames, 24.0)
    media.save_video(folder / "dark.mp4", _night(36), 24.0)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "pan.txt").write_text(CAPTION, "utf-8")
    return folder


def _night(num_frames: int) -> np.ndarray:
    """Lights that move over a dark ground: too dark, but neither black nor still."""
    blocks = np.random.default_rng(7).random((24, 32)) < 0.05
    lights = np.kron(blocks, np.full((4, 4), 150, np.uint8)).astype(np.uint8)
    frames = [np.roll(lights, 2 * index, axis=1) for index in range(num_frames)]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def write_data_root(folder: Path, uri: str | None = None) -> DataRoot:
    """Ingest, select and tokenize; the visual tokenizer has random weights."""
    config, source, uri = root_config(), write_source(folder / "videos"), uri or f"{folder}/data"
    return prepare(source, uri, config, commit_tokenizer(uri, folder))


def prepare(source: Path, uri: str, config: RunConfig, tokenizer: TokenizerRef) -> DataRoot:
    """Ingest, select and tokenize what is not done yet, with a tokenizer that is there."""
    files = discover_videos(str(source))
    plan = ingestion.plan_ingestion(str(source), files, uri, config.ingestion)
    new = [ingestion.ingest_video(file, uri, config.ingestion) for file in plan.todo]
    clips = plan.committed or ingestion.commit_clips(
        str(source), (*plan.done, *new), uri, plan, config.ingestion
    )
    selection = ingestion.select_clips(clips, config.selection, output_uri=uri)
    units = plan_tokenization(selection, tokenizer, config, output_uri=uri)
    if units.committed is not None:
        return DataRoot(uri, source, config, selection, units.committed)
    work = ClipTokenizer(tokenizer, config)
    done = (*units.done, *(work(unit) for unit in units.todo))
    datasets = commit_tokens(units, done, tokenizer, config, output_uri=uri)
    return DataRoot(uri, source, config, selection, datasets)


def commit_tokenizer(uri: str, folder: Path, *, seed: int = 0) -> TokenizerRef:
    """Commit a visual tokenizer where runs do; another seed replaces its weights."""
    written = factories.write_visual_tokenizer(str(folder), seed=seed)
    place = f"{uri}/tokenizers/visual/{'0' * 32}"
    storage.upload_directory(storage.local_path(written.directory_uri), f"{place}/model")
    values = {"manifest_uri": f"{place}/manifest.json", "directory_uri": f"{place}/model"}
    record = TokenizerRef(**{**written.model_dump(), **values})
    return storage.commit_record(record.manifest_uri, record)


def flip_bit(path: Path, place: int, bit: int) -> None:
    """Turn one bit of a file around."""
    data = np.fromfile(path, np.uint8)
    data[place] ^= 1 << bit
    data.tofile(path)


def read_rows(shard: ShardInfo) -> list[dict[str, Any]]:
    """Rows of a shard."""
    rows: list[dict[str, Any]] = read_shard(
        shard, codebook_size=factories.CODEBOOK_SIZE
    ).to_pylist()
    return rows
