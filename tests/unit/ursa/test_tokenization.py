import shutil

import numpy as np
import pytest
import torch

from tests import factories, media
from ursa import storage
from ursa.artifacts import VideoInfo
from ursa.data.clips import read_selection
from ursa.data.dataset import TokenSamples
from ursa.data.shards import read_shard
from ursa.errors import FailureBudgetExceeded
from ursa.tokenization import (
    ClipTokenizer,
    commit_tokens,
    encode_clip,
    latent_shape,
    plan_tokenization,
    read_clip,
)
from ursa.tokenizers.visual import load_visual_tokenizer
from ursa.video.decode import read_frames, video_info

CONFIG = factories.tiny_config()


def make_clips(folder, count=3):
    clips = []
    for index in range(count):
        frames = media.panning(12 * (3 + index), step=2, height=48, width=64, seed=index)
        path = media.save_video(folder / f"clip{index}.mp4", frames, 12.0)
        caption = factories.CAPTIONS[index]
        clips.append(factories.clip_of(path, caption=caption, info=video_info(path), index=index))
    return clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def tokenizer_ref(tmp_path_factory):
    return factories.write_visual_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def selection(clips, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("selection"))
    return factories.commit_selection(uri, clips, num_validation=1)


def run(selection, tokenizer_ref, output_uri, config=CONFIG):
    plan = plan_tokenization(selection, tokenizer_ref, config, output_uri=output_uri)
    if plan.committed:
        return plan.committed
    work = clip_tokenizer(tokenizer_ref)
    units = [*plan.done, *(work(unit) for unit in plan.todo)]
    return commit_tokens(plan, units, tokenizer_ref, config, output_uri=output_uri)


_TOKENIZERS: dict[str, ClipTokenizer] = {}


def clip_tokenizer(tokenizer_ref):
    """One for all tests: each has a process that decodes."""
    place = tokenizer_ref.directory_uri
    if place not in _TOKENIZERS:
        _TOKENIZERS[place] = ClipTokenizer(tokenizer_ref, CONFIG)
    return _TOKENIZERS[place]


def tokenize_clip(clip, split, tokenizer, settings):
    return encode_clip(clip, split, read_clip(clip, split, settings), tokenizer, settings)


def files_below(path):
    return {item.uri: item.etag for item in storage.list_files(str(path))}


def test_clips_become_four_data_sets(selection, tokenizer_ref, clips, tmp_path):
    datasets = run(selection, tokenizer_ref, str(tmp_path))
    assert datasets.num_failed_clips == 0
    for modality in ("image", "video"):
        for split, own in (("train", clips[:2]), ("validation", clips[2:])):
            dataset = datasets.get(modality, split)
            assert dataset.latent_shape == latent_shape(CONFIG, modality)
            samples = TokenSamples(dataset)
            assert len(samples) == dataset.num_samples > 0
            assert len(set(samples.sample_ids)) == len(samples)
            assert set(samples.clip_ids) == {clip.clip_id for clip in own}
            assert set(samples.captions) == {clip.caption for clip in own}
            batch = samples.batch(range(len(samples)))
            assert dataset.num_tokens == batch.visual_ids.numel()
            assert batch.visual_ids.max() < 60
    # two clips of 3 and 4 s, a sample of 5 frames at 8 fps every half second
    assert datasets.video_train.num_samples == 5 + 7
    assert set(TokenSamples(datasets.image_train).motion) == {None}
    assert set(TokenSamples(datasets.video_train).motion) == {5.0, 6.0}


def test_ids_are_those_of_the_decoded_frames(tokenizer_ref, clips):
    tokenizer = load_visual_tokenizer(storage.local_path(tokenizer_ref.directory_uri))
    rows = tokenize_clip(clips[0], "train", tokenizer, CONFIG.tokenization)
    path = storage.local_path(clips[0].media_uri)
    for modality, num_frames in (("image", 1), ("video", 5)):
        for row in rows[modality]:
            first = round(row["start_s"] * 12)
            indices = [first + int(np.round(i * 12 / 8)) for i in range(num_frames)]
            frames = read_frames(path, indices, height_px=16, width_px=24)
            ids = tokenizer.encode(frames[None])[0]
            assert np.array_equal(row["visual_ids"], ids.flatten())
            shape = (row["num_latent_frames"], row["num_rows"], row["num_columns"])
            assert shape == tuple(ids.shape) == latent_shape(CONFIG, modality)


def test_only_training_samples_have_variants(tokenizer_ref, clips):
    tokenizer = load_visual_tokenizer(storage.local_path(tokenizer_ref.directory_uri))
    settings = CONFIG.tokenization.model_copy(update={"image_variants": 2, "video_variants": 1})

    def tokenized(split):
        rows = tokenize_clip(clips[0], split, tokenizer, settings)
        return {
            modality: [row | {"visual_ids": row["visual_ids"].tolist()} for row in part]
            for modality, part in rows.items()
        }

    plain, varied = tokenized("validation"), tokenized("train")
    assert len(varied["image"]) == 3 * len(plain["image"])
    assert len(varied["video"]) == 2 * len(plain["video"])
    assert [row for row in varied["video"] if row["variant"] == 0] == plain["video"]
    assert len({row["sample_id"] for row in varied["image"]}) == len(varied["image"])
    assert varied == tokenized("train")


def test_first_frame_as_image_is_the_first_latent_frame(tokenizer_ref, clips):
    tokenizer = load_visual_tokenizer(storage.local_path(tokenizer_ref.directory_uri))
    rows = tokenize_clip(clips[0], "train", tokenizer, CONFIG.tokenization)
    images = {row["start_s"]: row["visual_ids"] for row in rows["image"]}
    for row in rows["video"]:
        assert np.array_equal(row["visual_ids"][:6], images[row["start_s"]])


def test_a_second_run_does_nothing(selection, tokenizer_ref, tmp_path):
    first = run(selection, tokenizer_ref, str(tmp_path))
    before = files_below(tmp_path)
    plan = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=str(tmp_path))
    assert plan.committed == first
    assert plan.todo == ()
    assert run(selection, tokenizer_ref, str(tmp_path)) == first
    assert files_below(tmp_path) == before


def test_finished_units_are_not_done_again(selection, tokenizer_ref, tmp_path):
    plan = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=str(tmp_path))
    # a plan holds no clip as an object until somebody asks, and gives each back as it was
    assert not any("clips" in vars(unit) for unit in plan.todo)
    assert [len(unit.clips) for unit in plan.todo] == [2, 1]
    kept = {item.clip.clip_id: item.clip for item in read_selection(selection) if item.kept}
    assert {clip.clip_id: clip for unit in plan.todo for clip in unit.clips} == kept
    done = clip_tokenizer(tokenizer_ref)(plan.todo[0])
    again = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=str(tmp_path))
    assert again.done == (done,)
    assert again.todo == plan.todo[1:]


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_unit_killed_before_its_record_leaves_no_duplicate(
    selection, tokenizer_ref, tmp_path, monkeypatch, killed_after
):
    """The process dies after writing some of a unit's shards, before its record."""
    plan = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=str(tmp_path / "a"))
    written = 0
    real = storage.put_if_absent

    def die(uri, data):
        nonlocal written
        if written == killed_after:
            raise KeyboardInterrupt
        written += 1
        return real(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", die)
        with pytest.raises(KeyboardInterrupt):
            clip_tokenizer(tokenizer_ref)(plan.todo[0])
    assert len(files_below(tmp_path / "a")) == killed_after
    datasets = run(selection, tokenizer_ref, str(tmp_path / "a"))
    clean = run(selection, tokenizer_ref, str(tmp_path / "b"))
    for modality in ("image", "video"):
        for split in ("train", "validation"):
            one, other = (TokenSamples(d.get(modality, split)) for d in (datasets, clean))
            assert one.sample_ids == other.sample_ids
            every = range(len(one))
            assert torch.equal(one.batch(every).visual_ids, other.batch(every).visual_ids)
    shards = [uri for uri in files_below(tmp_path / "a") if "/shards/" in uri]
    assert len(shards) == 4


def test_order_of_the_results_does_not_matter(selection, tokenizer_ref, tmp_path):
    work = clip_tokenizer(tokenizer_ref)
    committed = []
    for name, turn in (("a", 1), ("b", -1)):
        uri = str(tmp_path / name)
        plan = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=uri)
        units = [work(unit) for unit in plan.todo[::turn]]
        committed.append(commit_tokens(plan, units, tokenizer_ref, CONFIG, output_uri=uri))
    hashes = [[shard.sha256 for shard in item.video_train.shards] for item in committed]
    assert hashes[0] == hashes[1]


def test_number_of_decoders_does_not_matter(clips, tokenizer_ref, tmp_path):
    selection = factories.commit_selection(str(tmp_path / "s"), clips)
    config = factories.tiny_config({"tokenization": {"clips_per_shard": 3, "video_variants": 1}})
    hashes = []
    for num_decoders in (1, 3):
        uri = str(tmp_path / str(num_decoders))
        plan = plan_tokenization(selection, tokenizer_ref, config, output_uri=uri)
        work = ClipTokenizer(tokenizer_ref, config, num_decoders=num_decoders)
        units = [work(unit) for unit in plan.todo]
        work.close()
        hashes.append([(unit.image.sha256, unit.video.sha256) for unit in units])
    assert hashes[0] == hashes[1]


def test_a_clip_that_cannot_be_read_is_named_not_lost(clips, tokenizer_ref, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    info: VideoInfo = clips[0].info
    broken = factories.clip_of(path, caption="broken", info=info, index=7)
    selection = factories.commit_selection(str(tmp_path / "s"), [*clips[:2], broken])
    with pytest.raises(FailureBudgetExceeded, match=r"1 of 3 clips could not .*broken\.mp4"):
        run(selection, tokenizer_ref, str(tmp_path / "out"))
    lenient = factories.tiny_config({"tokenization": {"max_failed_fraction": 0.5}})
    datasets = run(selection, tokenizer_ref, str(tmp_path / "out"), lenient)
    assert datasets.num_failed_clips == 1
    assert set(TokenSamples(datasets.video_train).clip_ids) == {c.clip_id for c in clips[:2]}


@pytest.mark.parametrize("content", [None, b"other bytes"], ids=["missing", "damaged"])
def test_a_clip_that_is_away_is_tried_again(clips, tokenizer_ref, tmp_path, content):
    """Its unit is not done, and the data set without it is not the one that has it."""
    path = tmp_path / "away.mp4"
    shutil.copy(storage.local_path(clips[0].media_uri), path)
    away = factories.clip_of(path, caption="away", info=clips[0].info, index=7)
    config = factories.tiny_config({"tokenization": {"max_failed_fraction": 0.5}})
    selection = factories.commit_selection(str(tmp_path / "s"), [*clips[:2], away])
    uri = str(tmp_path / "out")
    kept = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    without = run(selection, tokenizer_ref, uri, config)
    assert (without.num_failed_clips, without.num_unavailable_clips) == (1, 1)
    assert run(selection, tokenizer_ref, uri, config) == without
    path.write_bytes(kept)
    whole = run(selection, tokenizer_ref, uri, config)
    assert (whole.num_failed_clips, whole.num_unavailable_clips) == (0, 0)
    assert whole.fingerprint != without.fingerprint
    assert set(TokenSamples(whole.video_train).clip_ids) == {
        clip.clip_id for clip in (*clips[:2], away)
    }
    assert plan_tokenization(selection, tokenizer_ref, config, output_uri=uri).committed == whole


def test_a_failed_budget_holds_after_a_restart(clips, tokenizer_ref, tmp_path):
    """One failure in four is within a third, also when three units were done before."""
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    broken = factories.clip_of(path, caption="broken", info=clips[0].info, index=7)
    config = factories.tiny_config(
        {"tokenization": {"max_failed_fraction": 0.34, "clips_per_shard": 1}}
    )
    selection = factories.commit_selection(str(tmp_path / "s"), [*clips, broken])
    uri = str(tmp_path / "out")
    plan = plan_tokenization(selection, tokenizer_ref, config, output_uri=uri)
    work = clip_tokenizer(tokenizer_ref)
    for unit in plan.todo:
        work(unit)
    datasets = run(selection, tokenizer_ref, uri, config)
    assert datasets.num_failed_clips == 1


def test_short_clips_give_images_alone(tokenizer_ref, tmp_path):
    frames = media.panning(6, step=2, height=48, width=64)
    path = media.save_video(tmp_path / "short.mp4", frames, 12.0)
    clip = factories.clip_of(path, caption="short", info=video_info(path))
    selection = factories.commit_selection(str(tmp_path / "s"), [clip])
    plan = plan_tokenization(selection, tokenizer_ref, CONFIG, output_uri=str(tmp_path / "o"))
    unit = clip_tokenizer(tokenizer_ref)(plan.todo[0])
    assert (unit.num_too_short, unit.video) == (1, None)
    assert read_shard(unit.image, codebook_size=60).num_rows == 1
    datasets = commit_tokens(plan, [unit], tokenizer_ref, CONFIG, output_uri=str(tmp_path / "o"))
    assert datasets.video_train.num_samples == 0
    assert datasets.image_train.num_samples == 1
