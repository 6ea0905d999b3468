import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import factories
from ursa import storage
from ursa.data.clips import read_clips
from ursa.errors import ClipUnavailableError, ConfigError, DataExhaustedError
from ursa.tokenizers.ibq import ImageAutoencoder, ImageConfig
from ursa.tokenizers.visual import load_visual_tokenizer, save_visual_tokenizer
from ursa.training import visual_tokenizer as module
from ursa.training.text_tokenizer import fit_text_tokenizer
from ursa.training.visual_tokenizer import fit_visual_tokenizer
from ursa.video.decode import read_frames, video_info
from ursa.video.encode import VideoWriter

VIDEOS = Path(__file__).parents[3] / "data" / "videos"


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """Two real videos, small and slow, as reading them is not what is tested."""
    folder, clips = tmp_path_factory.mktemp("clips"), []
    for index, name in enumerate(("tree_hand.mp4", "cardboard_box.mp4")):
        every_third = range(0, video_info(VIDEOS / name).num_frames, 3)
        frames = read_frames(VIDEOS / name, every_third, height_px=72, width_px=128)
        with VideoWriter(folder / name, width_px=128, height_px=72, fps=8.0) as writer:
            for frame in frames:
                writer.add(frame)
        caption, info = factories.CAPTIONS[index], video_info(folder / name)
        clips.append(factories.clip_of(folder / name, caption=caption, info=info, index=index))
    uri = str(tmp_path_factory.mktemp("selection"))
    return factories.commit_selection(uri, clips, num_validation=1)


def config(**changes):
    return factories.tiny_config({"visual_tokenizer": {"max_steps": 30, **changes}})


FITTED = config(
    max_steps=60, hidden_channels=24, batch_size=4, augmented_fraction=0.5, checkpoint_every=30
)


@pytest.fixture(scope="module")
def fitted(selection, tmp_path_factory):
    steps = []
    uri = str(tmp_path_factory.mktemp("fit"))
    ref = fit_visual_tokenizer(
        selection, FITTED, output_uri=uri, on_metrics=lambda step, m: steps.append((step, m))
    )
    return ref, uri, steps


def test_fitting_improves_on_the_pca_start(fitted):
    ref, _, _ = fitted
    metrics = ref.metrics
    assert metrics["psnr_pca_train"] > 12
    assert metrics["psnr_train"] > metrics["psnr_pca_train"]
    assert metrics["psnr_validation"] > metrics["psnr_pca_validation"]
    assert 10 <= metrics["codes_used"] <= 60
    assert 1 < metrics["code_perplexity"] <= metrics["codes_used"]


def test_a_clip_that_cannot_be_decoded_is_left_out(selection, tmp_path, caplog):
    clips = read_clips(selection.clips)
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    broken = factories.clip_of(path, caption="broken", info=clips[0].info, index=2)
    mixed = factories.commit_selection(str(tmp_path / "s"), [broken, *clips], num_validation=1)
    few = config(max_steps=1, max_windows=32)
    ref = fit_visual_tokenizer(mixed, few, output_uri=str(tmp_path / "out"))
    assert ref.metrics["psnr_train"] > 5
    assert "left out of the fit" in caplog.text
    assert "broken.mp4" in caplog.text


def test_a_clip_that_is_away_is_an_error_and_nothing_is_committed(selection, tmp_path):
    """A fit without it would be taken for the whole one when it is back."""
    clips = read_clips(selection.clips)
    path = tmp_path / "away.mp4"
    shutil.copy(storage.local_path(clips[0].media_uri), path)
    away = factories.clip_of(path, caption="away", info=clips[0].info, index=2)
    mixed = factories.commit_selection(str(tmp_path / "s"), [away, *clips], num_validation=1)
    few = config(max_steps=1, max_windows=32)
    path.unlink()
    with pytest.raises(ClipUnavailableError, match=r"away\.mp4 is missing"):
        fit_visual_tokenizer(mixed, few, output_uri=str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_fit_that_ends_below_its_start_is_refused(selection, tmp_path):
    ref = fit_visual_tokenizer(
        selection, config(max_steps=2, learning_rate=0.5), output_uri=str(tmp_path)
    )
    assert ref.metrics["psnr_validation"] == ref.metrics["psnr_pca_validation"]
    assert ref.metrics["psnr_train"] == ref.metrics["psnr_pca_train"]


def test_pca_alone_beats_a_flat_picture(selection, tmp_path):
    ref = fit_visual_tokenizer(selection, config(max_steps=0), output_uri=str(tmp_path))
    assert ref.metrics["psnr_train"] == ref.metrics["psnr_pca_train"]
    windows = module.shrink(module._read_windows([], config()))
    assert len(windows) == 0
    clips = [item.clip for item in module.read_selection(selection) if item.split == "train"]
    windows = module.shrink(module._read_windows(clips, config()))
    flat = np.broadcast_to(windows.mean((1, 2, 3), keepdims=True).round(), windows.shape)
    floor = module.psnr_db(windows, flat.astype(np.uint8))
    assert ref.metrics["psnr_train"] > floor


def test_committed_tokenizer_can_be_read_and_is_not_fitted_again(fitted, selection):
    ref, uri, steps = fitted
    tokenizer = load_visual_tokenizer(storage.local_path(ref.directory_uri))
    assert len(tokenizer.codebook) == ref.vocab_size == 60
    assert ref.sha256 == factories.hashes_of(storage.local_path(ref.directory_uri))
    assert steps
    assert steps[-1][1]["tokenizer/psnr_train"] == ref.metrics["psnr_train"]
    again = fit_visual_tokenizer(
        selection, FITTED, output_uri=uri, on_metrics=lambda *_: pytest.fail("fitted again")
    )
    assert again == ref


def test_an_interrupted_fit_goes_on_to_the_same_weights(selection, tmp_path, monkeypatch):
    settings = config(max_steps=6, checkpoint_every=2)
    whole = fit_visual_tokenizer(selection, settings, output_uri=str(tmp_path / "a"))
    real, calls = module._fitting_batch, []

    def die(windows, tokenizer_settings, step):
        calls.append(step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(windows, tokenizer_settings, step)

    monkeypatch.setattr(module, "_fitting_batch", die)
    with pytest.raises(KeyboardInterrupt):
        fit_visual_tokenizer(selection, settings, output_uri=str(tmp_path / "b"))
    resumed = fit_visual_tokenizer(selection, settings, output_uri=str(tmp_path / "b"))
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5]
    assert resumed.metrics == whole.metrics
    states = [
        load_visual_tokenizer(storage.local_path(ref.directory_uri)).network.state_dict()
        for ref in (whole, resumed)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    left = [item.uri for item in storage.list_files(str(tmp_path / "b")) if "/fit/" in item.uri]
    assert left == []


def test_an_existing_tokenizer_is_taken_as_it_is(fitted, selection, tmp_path):
    ref, _, _ = fitted
    taken = fit_visual_tokenizer(
        selection, config(directory_uri=ref.directory_uri), output_uri=str(tmp_path)
    )
    assert taken.metrics == {}
    one, other = (load_visual_tokenizer(storage.local_path(r.directory_uri)) for r in (ref, taken))
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])


def test_an_existing_tokenizer_of_other_strides_is_refused(selection, tmp_path):
    network = ImageAutoencoder(ImageConfig(block_out_channels=(32,) * 5, latent_channels=4))
    save_visual_tokenizer(network, tmp_path / "image")
    settings = config(directory_uri=str(tmp_path / "image"))
    with pytest.raises(ConfigError, match=r"strides \(1, 16\), but .* says \(4, 8\)"):
        fit_visual_tokenizer(selection, settings, output_uri=str(tmp_path))


def test_clips_that_are_too_short_say_what_to_do(selection, tmp_path):
    long = factories.tiny_config({"tokenization": {"num_frames": 101}})
    with pytest.raises(DataExhaustedError, match="101 frames at 8 frames per second; lower"):
        fit_visual_tokenizer(selection, long, output_uri=str(tmp_path))


def test_fitting_samples_are_a_function_of_the_step(selection):
    settings = config(augmented_fraction=1.0)
    clips = [item.clip for item in module.read_selection(selection)]
    windows = module._read_windows(clips, settings)
    one, same, other = (
        module._fitting_batch(windows, settings.visual_tokenizer, step) for step in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (2, 3, 5, 16, 24)
    assert -1 <= one.min() <= one.max() <= 1


def test_text_tokenizer_is_trained_on_training_captions(selection, tmp_path):
    settings = factories.tiny_config()
    ref = fit_text_tokenizer(selection, settings, output_uri=str(tmp_path))
    assert ref.kind == "text"
    assert 258 <= ref.vocab_size <= 300
    assert 0 < ref.metrics["tokens_per_caption"] <= 6
    assert ref.sha256 == factories.hashes_of(storage.local_path(ref.directory_uri))
    before = {item.uri: item.etag for item in storage.list_files(str(tmp_path))}
    assert fit_text_tokenizer(selection, settings, output_uri=str(tmp_path)) == ref
    assert {item.uri: item.etag for item in storage.list_files(str(tmp_path))} == before
    given = factories.tiny_config({"text_tokenizer": {"directory_uri": ref.directory_uri}})
    taken = fit_text_tokenizer(selection, given, output_uri=str(tmp_path))
    assert taken.vocab_size == ref.vocab_size
    assert taken.fingerprint != ref.fingerprint
