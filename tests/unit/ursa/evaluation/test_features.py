import numpy as np
import pytest

from tests import factories, media, tiny_models
from ursa.config import ModelFilesConfig
from ursa.errors import ConfigError
from ursa.evaluation.clips import measure_clip
from ursa.evaluation.features import (
    frechet_distance,
    latents,
    network_features,
    reduce_features,
    rms_distances,
    statistics,
    thumbnail,
)
from ursa.tokenizers.visual import load_visual_tokenizer

RNG = np.random.default_rng


def test_distance_of_thumbnails_is_in_levels():
    dark = np.full((3, 36, 64, 3), 20, np.uint8)
    rows = np.stack([thumbnail(dark), thumbnail(dark + np.uint8(7))])
    assert rows.shape == (2, 3 * 9 * 16 * 3)
    np.testing.assert_allclose(rms_distances(rows, rows), [[0, 7], [7, 0]], atol=1e-6)


def test_frechet_distance_of_normal_laws():
    # |0 - 2|^2 + (1 - 3)^2 in each of two dimensions
    one, other = RNG(0).normal(size=(200_000, 2)), 2 + 3 * RNG(1).normal(size=(200_000, 2))
    assert frechet_distance(one, other) == pytest.approx(2 * (4 + 4), rel=0.03)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one[:, :1], other[:, :1]) == pytest.approx(8, rel=0.03)


def test_fewer_features_than_clips_are_left():
    reference, rows = RNG(0).normal(size=(40, 10)), RNG(1).normal(size=(8, 10))
    real, drawn = reduce_features(reference, rows)
    assert (real.shape, drawn.shape) == ((40, 4), (8, 4))
    real, _ = reduce_features(reference, reference)
    np.testing.assert_allclose(real.std(axis=0), 1)


def test_statistics_and_latents_of_a_clip(tmp_path):
    frames = media.panning(5, step=2, height=32, width=48)
    values = measure_clip(frames, 8.0)
    found = statistics(frames, values)
    assert found.shape == (10,)
    assert found[7] == pytest.approx(np.log1p(values.motion))
    reference = factories.write_visual_tokenizer(str(tmp_path))
    tokenizer = load_visual_tokenizer(tmp_path / "visual")
    assert reference.vocab_size == len(tokenizer.codebook)
    channels = tokenizer.codebook.shape[1]
    assert latents(tokenizer, [frames, frames[:1]][:1]).shape == (1, 3 * channels)
    assert latents(tokenizer, [frames[:1]]).shape == (1, 2 * channels)


def test_an_image_network_may_give_the_features(tmp_path):
    frames = media.panning(5, step=2, height=32, width=48)
    clips = [frames, np.repeat(frames[:1], 5, axis=0)]
    config = ModelFilesConfig(model=str(tiny_models.write_clip(tmp_path / "clip")), num_frames=3)
    found = network_features(config, clips)
    assert found.shape == (2, 2 * tiny_models.EMBEDDING)
    # what stands still does not change in time
    np.testing.assert_allclose(found[1, tiny_models.EMBEDDING :], 0, atol=1e-6)
    assert np.abs(found[0, tiny_models.EMBEDDING :]).max() > 1e-4
    np.testing.assert_array_equal(found, network_features(config, clips))


def test_what_is_no_image_network_is_named(tmp_path):
    config = ModelFilesConfig(model=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"evaluation\.clips\.features"):
        network_features(config, [media.still(3, height=32, width=48)])
