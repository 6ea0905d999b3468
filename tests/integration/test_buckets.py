"""Clips of several shapes through ingestion, tokenization and training: none is left out."""

from collections import Counter

import pytest

from tests import data_roots, factories, media
from ursa.artifacts import TokenizerRef
from ursa.data.buckets import choose_bucket
from ursa.data.clips import read_selection
from ursa.data.dataset import TokenSamples
from ursa.data.units import expected_sample_ids
from ursa.inspection.repair import repair_root
from ursa.inspection.root import VISUAL_TOKENIZERS, good_records
from ursa.inspection.stats import data_stats
from ursa.inspection.verify import verify_root
from ursa.training.stage import train_stage

pytestmark = pytest.mark.integration
BUCKETS = {
    "num_frames": 5,
    "height_px": 16,
    "width_px": 24,
    "extra_buckets": [
        {"num_frames": 5, "height_px": 24, "width_px": 16},
        {"num_frames": 13, "height_px": 16, "width_px": 24},
    ],
    "clips_per_shard": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two wide videos, three upright ones, one that is long, one too short for a sample."""
    folder = tmp_path_factory.mktemp("buckets")
    source = folder / "videos"
    source.mkdir()
    config = data_roots.root_config(
        tokenization=BUCKETS,
        ingestion={"max_clip_s": 4.0, "min_clip_s": 0.2},
        selection={"validation_fraction": 0.0},
    )
    for seed, (width, height, frames) in enumerate(
        [(128, 96, 30)] * 2 + [(96, 128, 30)] * 3 + [(128, 96, 80), (128, 96, 8)]
    ):
        pictures = media.panning(frames, step=2, height=height, width=width, seed=seed)
        media.save_video(source / f"v{seed}.mp4", pictures, 24.0)
    tokenizer = data_roots.commit_tokenizer(f"{folder}/data", folder)
    return data_roots.prepare(source, f"{folder}/data", config, tokenizer)


def test_every_sample_of_every_clip_is_in_its_bucket_or_counted(root):
    settings = root.config.tokenization
    chosen = Counter(
        choose_bucket(item.clip, settings) for item in read_selection(root.selection) if item.kept
    )
    assert chosen == {0: 2, 1: 3, 2: 2}
    sets = root.datasets.of("video", "train")
    assert [part.latent_shape for part in sets] == [(2, 2, 3), (2, 3, 2), (4, 2, 3)]
    assert [part.latent_shape for part in root.datasets.of("image", "train")] == [
        (1, 2, 3),
        (1, 3, 2),
        (1, 2, 3),
    ]
    assert root.datasets.num_short_clips == 1
    for part in (*sets, *root.datasets.of("image", "train")):
        clips = [
            item.clip
            for item in read_selection(root.selection)
            if choose_bucket(item.clip, settings) == part.bucket
        ]
        own = settings.model_copy(
            update={"num_frames": 13 if part.bucket == 2 else 5, "extra_buckets": ()}
        )
        expected = {
            name
            for clip in clips
            for name in expected_sample_ids(clip, part.modality, "train", own)
        }
        assert set(TokenSamples(part).sample_ids) == expected


def test_the_bucket_table_verify_and_repair_know_them(root):
    assert verify_root(root.uri).problems == ()
    counted = data_stats(root.uri).tokens
    assert {part.latent_shape for part in counted} >= {(2, 3, 2), (4, 2, 3)}
    before = {uri: sha256 for uri, (sha256, _) in root.files().items()}
    for path in root.shards():
        path.unlink()
    assert repair_root(root.uri).num_left == 0
    assert {uri: sha256 for uri, (sha256, _) in root.files().items()} == before


def test_a_further_bucket_changes_the_shards_of_its_clips_alone(root):
    tokenization = {**BUCKETS, "extra_buckets": BUCKETS["extra_buckets"][:1]}
    config = root.config.model_copy(
        update={"tokenization": data_roots.root_config(tokenization=tokenization).tokenization}
    )
    (tokenizer,) = good_records(root.uri, VISUAL_TOKENIZERS, TokenizerRef)
    fewer = data_roots.prepare(root.source, root.uri, config, tokenizer)
    upright, same = (item.of("video", "train")[1] for item in (root.datasets, fewer.datasets))
    assert upright.shards == same.shards
    assert upright.num_samples > 0


def test_a_stage_sees_all_sizes_and_images(root, tmp_path):
    data = factories.write_tiny_data(str(tmp_path / "tiny"))
    request = factories.stage_request(
        data._replace(datasets=root.datasets),
        "video_pretrain",
        str(tmp_path / "out"),
        max_steps=8,
        global_batch_size=2,
        image_fraction=0.25,
        validate_every=8,
        checkpoint_every=4,
    )
    metrics = factories.MetricsFile(tmp_path / "metrics.jsonl")
    checkpoint = train_stage(request, on_metrics=metrics.on_metrics)
    assert checkpoint.step == 8
    assert all(loss < 6 for loss in metrics.losses())
    assert checkpoint.num_samples_seen == int(metrics.rows()[-1]["train/samples_seen"])
