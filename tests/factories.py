"""Tiny real objects: a configuration, token data sets and stage requests of milliseconds."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    CheckpointRef,
    Clip,
    ClipScores,
    ClipSelection,
    ClipSet,
    StageRequest,
    TokenDataset,
    TokenDatasets,
    TokenizerRef,
    VideoInfo,
)
from ursa.config import RunConfig, fingerprint, load_config
from ursa.data.clips import (
    CLIP_SCHEMA,
    SELECTION_SCHEMA,
    clip_row,
    put_table,
    selection_rows,
)
from ursa.data.shards import write_shard
from ursa.model.transformer import TransformerConfig
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.text import train_text_tokenizer
from ursa.tokenizers.visual import save_visual_tokenizer

CAPTIONS = ("a red ball rolls", "the night city", "a tree, slowly", "boîte ouverte")

OVERRIDES: dict[str, Any] = {
    "visual_tokenizer": {
        "levels": [5, 4, 3],
        "hidden_channels": 8,
        "num_residual_blocks": 1,
        "max_steps": 4,
        "batch_size": 2,
        "max_windows": 16,
        "checkpoint_every": 2,
    },
    "tokenization": {
        "num_frames": 5,
        "height_px": 16,
        "width_px": 24,
        "window_stride_s": 0.5,
        "image_stride_s": 0.5,
        "image_variants": 0,
        "video_variants": 0,
        "clips_per_shard": 2,
    },
    "text_tokenizer": {"vocab_size": 300, "max_prompt_length": 6},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "path": {"schedule": "fixed", "alpha": 1.0, "c": 5.0},
    "evaluation": {
        "timesteps": [0.0, 0.5, 0.9],
        "max_samples": 4,
        "batch_size": 4,
        "sampling": {"num_inference_steps": 3, "num_prompts": 2},
        "clips": {
            "num_prompts": 2,
            "seeds_per_prompt": 2,
            "num_windows": 3,
            "max_train_windows": 8,
            "asked_motion": [2.0, 32.0],
            "fewer_steps": [1],
        },
    },
}
_STAGE = {
    "max_steps": 6,
    "synchronous_fraction": 0.0,
    "global_batch_size": 4,
    "learning_rate": 3.0e-3,
    "warmup_steps": 2,
    "checkpoint_every": 3,
    "validate_every": 6,
    "log_every": 1,
}
LATENT_SHAPES = {"image": (1, 2, 3), "video": (2, 2, 3)}
CODEBOOK_SIZE = 60


class TinyData(NamedTuple):
    """What a stage reads."""

    datasets: TokenDatasets
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, for readable changes in tests."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        both = isinstance(value, Mapping) and isinstance(known, Mapping)
        result[key] = merged(known, value) if both else value
    return result


def tiny_config(changes: Mapping[str, Any] | None = None) -> RunConfig:
    stages = dict.fromkeys(("image_pretrain", "video_pretrain", "async_finetune"), _STAGE)
    return load_config("tiny", merged(merged(OVERRIDES, {"stages": stages}), changes or {}))


def transformer_config(**changes: Any) -> TransformerConfig:
    """The network of `tiny_config` over 50 text ids and 60 codes."""
    values = tiny_config().model.model_dump()
    values["num_hidden_layers"] = values["max_window_layers"] = values.pop("num_layers")
    values |= {
        "vocab_size": 50 + CODEBOOK_SIZE,
        "lm_vocab_size": 50,
        "lm_head_size": CODEBOOK_SIZE,
        "bov_token_id": 49,
    }
    return TransformerConfig(**(values | changes))


def write_visual_tokenizer(output_uri: str, *, seed: int = 0) -> TokenizerRef:
    """Commit a visual tokenizer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = tiny_config().visual_tokenizer
        network = FittedAutoencoder(
            FittedConfig(
                levels=settings.levels,
                hidden_channels=settings.hidden_channels,
                num_residual_blocks=settings.num_residual_blocks,
            )
        )
        # make latents of size 1, so that many codes are used
        torch.nn.init.normal_(network.linear_in.weight, std=0.3)
    folder = Path(output_uri) / "visual"
    save_visual_tokenizer(network, folder)
    return TokenizerRef(
        manifest_uri=f"{output_uri}/visual.json",
        directory_uri=str(folder),
        kind="visual",
        vocab_size=network.quantizer.codebook_size,
        metrics={},
        sha256=hashes_of(folder),
        fingerprint=fingerprint("visual", seed),
    )


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of the files of a folder by their names, as it is uploaded."""
    return {path.name: storage.sha256_file(path) for path in folder.iterdir()}


def write_text_tokenizer(output_uri: str) -> TokenizerRef:
    """Commit a text tokenizer of the captions."""
    tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=300)
    folder = Path(output_uri) / "text"
    tokenizer.save(folder)
    return TokenizerRef(
        manifest_uri=f"{output_uri}/text.json",
        directory_uri=str(folder),
        kind="text",
        vocab_size=tokenizer.vocab_size,
        metrics={},
        sha256=hashes_of(folder),
        fingerprint=fingerprint("text"),
    )


def token_rows(
    modality: str, count: int, *, seed: int = 0, codebook_size: int = CODEBOOK_SIZE
) -> list[dict[str, Any]]:
    """Samples that can be learned: each caption has its own ids, a little disturbed."""
    random = np.random.default_rng(seed)
    shape = LATENT_SHAPES[modality]
    size = int(np.prod(shape))
    rows = []
    for index in range(count):
        scene = index % len(CAPTIONS)
        ids = (np.arange(size) * 7 + 13 * scene) % codebook_size
        noisy = random.random(size) < 0.1
        ids = np.where(noisy, random.integers(codebook_size, size=size), ids)
        rows.append(
            {
                "sample_id": f"{modality}-{seed}-{index:04d}",
                "clip_id": f"clip{scene}",
                "source_sha256": f"{scene:064x}",
                "media_sha256": f"{scene + 100:064x}",
                "start_s": index / 8,
                "variant": 0,
                "fps": 8.0,
                "num_latent_frames": shape[0],
                "num_rows": shape[1],
                "num_columns": shape[2],
                "visual_ids": ids.tolist(),
                "caption": CAPTIONS[scene],
                "motion_px_per_s": 3.0 * scene if modality == "video" and scene else None,
            }
        )
    return rows


def write_dataset(output_uri: str, modality: str, split: str, num_samples: int) -> TokenDataset:
    """Write samples as two shards with the real writer."""
    rows = token_rows(modality, num_samples, seed=int(split == "validation"))
    half = len(rows) // 2
    shards = tuple(
        write_shard(part, f"{output_uri}/{modality}-{split}-{i}", codebook_size=CODEBOOK_SIZE)
        for i, part in enumerate((rows[:half], rows[half:]))
        if part
    )
    shape = LATENT_SHAPES[modality]
    return TokenDataset(
        manifest_uri=f"{output_uri}/manifest.json",
        modality=modality,
        split=split,
        bucket=0,
        num_samples=num_samples,
        num_tokens=num_samples * int(np.prod(shape)),
        codebook_size=CODEBOOK_SIZE,
        visual_tokenizer_fingerprint="v",
        latent_shape=shape,
        shards=shards,
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(modality, split, num_samples),
    )


def write_tiny_data(output_uri: str, *, num_train: int = 20, num_validation: int = 6) -> TinyData:
    """Write tokenizers and the four data sets of a run."""
    datasets = {
        f"{modality}_{split}": write_dataset(output_uri, modality, split, count)
        for modality in ("image", "video")
        for split, count in (("train", num_train), ("validation", num_validation))
    }
    return TinyData(
        TokenDatasets(
            manifest_uri=f"{output_uri}/manifest.json",
            extra_buckets=(),
            num_failed_clips=0,
            num_short_clips=0,
            fingerprint=fingerprint("datasets", num_train, num_validation),
            **datasets,
        ),
        write_visual_tokenizer(output_uri),
        write_text_tokenizer(output_uri),
    )


def stage_request(
    data: TinyData,
    stage: str,
    output_uri: str,
    *,
    init_from: CheckpointRef | None = None,
    init_from_uri: str | None = None,
    config: Mapping[str, Any] | None = None,
    **changes: Any,
) -> StageRequest:
    """Return a request; `changes` replace values of the stage, `config` those of the run.

    `init_from` is the stage before, `init_from_uri` the value of that name in the configuration.
    """
    changes |= {"init_from": init_from_uri}
    values = merged(config or {}, {"stages": {stage: changes}})
    return StageRequest(
        stage=stage,
        config=tiny_config(values),
        datasets=data.datasets,
        visual_tokenizer=data.visual_tokenizer,
        text_tokenizer=data.text_tokenizer,
        init_from=init_from,
        output_uri=output_uri,
    )


def commit_selection(
    output_uri: str, clips: list[Clip], *, num_validation: int = 0
) -> ClipSelection:
    """Commit clips that are all kept; the last ones are held out."""
    rows = [clip_row(clip) for clip in clips]
    clips_uri = put_table(output_uri, "clips", CLIP_SCHEMA, rows)
    num_train = len(clips) - num_validation
    table = pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)
    splits = ["train" if i < num_train else "validation" for i in range(len(clips))]
    verdicts = selection_rows(table, [None] * len(clips), splits)
    selection_uri = put_table(output_uri, "selection", SELECTION_SCHEMA, verdicts)
    print_ = fingerprint("selection", [clip.clip_id for clip in clips], num_validation)
    clip_set = ClipSet(
        manifest_uri=f"{output_uri}/clips.json",
        clips_uri=clips_uri,
        source_uri=output_uri,
        num_videos=len(clips),
        num_failed=0,
        num_clips=len(clips),
        num_dropped_shots=0,
        failures={},
        config=tiny_config().ingestion,
        fingerprint=print_,
    )
    return ClipSelection(
        manifest_uri=f"{output_uri}/selection.json",
        selection_uri=selection_uri,
        clips=clip_set,
        num_kept=len(clips),
        num_train=num_train,
        num_validation=num_validation,
        rejections={},
        config=tiny_config().selection,
        thresholds=(),
        fingerprint=print_,
    )


def clip_of(path: Path, *, caption: str, info: VideoInfo, index: int = 0) -> Clip:
    """Describe a video file as a normalised clip."""
    digest = storage.sha256_file(path)
    return Clip(
        clip_id=fingerprint(digest, index)[:32],
        source_uri=path.as_uri(),
        source_sha256=digest,
        start_s=0.0,
        end_s=info.duration_s,
        media_uri=path.as_uri(),
        media_sha256=digest,
        info=info,
        scores=ClipScores(
            **dict.fromkeys(ClipScores.model_fields)
            | {
                "motion_px_per_s": 5.0 + index,
                "sharpness": 100.0,
                "luminance": 100.0,
                "black_border_fraction": 0.0,
                "frame_hashes": bytes(range(16)),
            }
        ),
        caption=caption,
        caption_source="manifest",
    )


def append_json_line(path: str, step: int, metrics: Mapping[str, float]) -> None:
    """An `on_metrics` that can be pickled: one line a call."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


class MetricsFile:
    """Metrics written by any process, read back here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_metrics = functools.partial(append_json_line, str(path))

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.rows()]
