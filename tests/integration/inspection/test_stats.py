import os
from pathlib import Path

import numpy as np
import pytest

from tests import data_roots
from ursa import storage
from ursa.data.clips import CLIP_SCHEMA, clip_row, put_table, read_clips, read_selection
from ursa.data.versions import commit_version
from ursa.errors import DataError
from ursa.ingestion import select_clips
from ursa.inspection.root import load_selection
from ursa.inspection.stats import QUANTILES, data_stats


def test_counts_are_those_of_the_rows(root):
    stats = data_stats(root.uri)
    clips = read_clips(root.selection.clips)
    kept = [item.clip for item in read_selection(root.selection) if item.kept]
    assert (stats.num_files, stats.num_failed_files) == (4, 1)
    assert (stats.num_clips, stats.num_kept) == (5, 4) == (len(clips), len(kept))
    assert stats.duration_s == pytest.approx(sum(clip.info.duration_s for clip in clips))
    assert stats.kept_duration_s == pytest.approx(sum(clip.info.duration_s for clip in kept))
    assert stats.resolutions == {"128x96": 5}
    assert stats.frame_rates == {"12": 5}
    assert stats.captions == {"template": 3, "sidecar": 2}
    assert stats.licences == {"unknown": 5}
    funnel = {row.step: (row.count, row.total) for row in stats.funnel}
    assert funnel["quarantined: not_a_video"] == (1, 4)
    assert funnel["rejected: too_dark"] == (1, 5)
    assert funnel["clips kept"] == (4, 5)
    assert stats.media_bytes == sum(path.stat().st_size for path in root.media())
    assert stats.shard_bytes == sum(path.stat().st_size for path in root.shards())
    assert stats.table_bytes == sum(
        path.stat().st_size
        for pattern in ("clips/sets/*/clips-*", "selections/*/selection-*")
        for path in Path(root.uri).glob(pattern)
    )


def test_scores_are_quantiles_of_all_and_of_kept_clips(root):
    stats = data_stats(root.uri)
    items = read_selection(root.selection)
    for scores, clips in (
        (stats.scores, [item.clip for item in items]),
        (stats.kept_scores, [item.clip for item in items if item.kept]),
    ):
        values = [clip.scores.luminance for clip in clips]
        assert scores["luminance"].num_measured == len(clips)
        assert scores["luminance"].values == pytest.approx(np.quantile(values, QUANTILES))
        assert "perceptual_hash" not in scores


def test_tokens_are_counted_by_modality_and_split(root):
    counts = {(part.modality, part.split): part for part in data_stats(root.uri).tokens}
    assert len(counts) == 4
    for (modality, split), part in counts.items():
        dataset = root.datasets.get(modality, split)
        assert part.num_samples == dataset.num_samples
        assert part.num_tokens == dataset.num_tokens
        assert part.num_shards == len(dataset.shards)
    Path(root.datasets.manifest_uri).with_name("recipe.json").unlink()
    assert data_stats(root.uri).tokens == ()
    assert len(data_stats(root.uri, config=root.config).tokens) == 4


def test_a_selection_can_be_named_by_its_folder(root, tmp_path):
    folder = root.selection.manifest_uri.rpartition("/")[0]
    assert data_stats(root.uri, selection_uri=folder) == data_stats(root.uri)
    with pytest.raises(DataError, match=r"no committed selection at .*gone/manifest\.json"):
        data_stats(root.uri, selection_uri=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="run the data preparation first"):
        data_stats(str(tmp_path))


def test_the_newest_selection_is_that_of_the_newest_version(records, tmp_path):
    """Not the one that was written last: times do not survive a copy, and sources go back."""
    root = records.root
    config = data_roots.root_config(selection={"validation_fraction": 0.0})
    other = select_clips(root.selection.clips, config.selection, output_uri=root.uri)
    assert load_selection(root.uri) == root.selection
    tokenizers = (records.versions[1].visual_tokenizer, records.versions[1].text_tokenizer)
    commit_version(root.uri, config, other, tokenizers, root.datasets, code={})
    for path in Path(root.uri).glob("selections/*/manifest.json"):
        os.utime(path, (1e9 + (str(path) != other.manifest_uri),) * 2)
    assert load_selection(root.uri) == other
    # a version of another source: the record that was written last
    clips = root.selection.clips.model_copy(update={"source_uri": "/elsewhere"})
    moved = root.selection.model_copy(update={"clips": clips})
    version = commit_version(root.uri, config, moved, tokenizers, root.datasets, code={})
    os.utime(version.manifest_uri, (2e9, 2e9))
    assert load_selection(root.uri) == root.selection
    os.utime(version.manifest_uri, (1e9, 1e9))
    assert load_selection(root.uri) == other
    storage.upload_directory(Path(root.uri), str(tmp_path / "copy"))
    assert load_selection(str(tmp_path / "copy")) in (other, root.selection)


def test_scores_of_extras_are_counted(root):
    clips = read_clips(root.selection.clips)
    rated = [
        clip.model_copy(update={"extra_scores": {"a/rating": 2.0 + k}})
        for k, clip in enumerate(clips[:-1])
    ]
    folder = f"{root.uri}/clips/sets/rated"
    table = put_table(folder, "clips", CLIP_SCHEMA, map(clip_row, [*rated, clips[-1]]))
    clip_set = root.selection.clips.model_copy(
        update={
            "clips_uri": table,
            "fingerprint": "rated",
            "manifest_uri": f"{folder}/manifest.json",
        }
    )
    config = data_roots.root_config(
        selection={"rules": [{"score": "rating", "scorer": "a", "keep_fraction": 0.5}]}
    )
    made = select_clips(clip_set, config.selection, output_uri=root.uri)
    stats = data_stats(root.uri, selection_uri=made.manifest_uri)
    found = stats.scores["a/rating"]
    assert (found.num_measured, found.num_missing) == (4, 1)
    assert (found.values[0], found.values[-1]) == (2.0, 5.0)
    assert stats.kept_scores["a/rating"].num_measured == stats.num_kept < 4
    assert stats.thresholds == made.thresholds
    assert made.thresholds[-1].is_relative
