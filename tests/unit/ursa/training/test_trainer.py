import math
import time
from contextlib import closing
from itertools import pairwise

import pytest
import torch

from tests import factories
from ursa import storage
from ursa.data.mixed_loader import MixedLoader, plan_parts
from ursa.data.shards import read_shard
from ursa.errors import ShardFormatError
from ursa.model.size import Clip, forward_flops
from ursa.training import stage as stage_module
from ursa.training.distributed import Group
from ursa.training.optim import build_average, learning_rate
from ursa.training.trainer import make_noisy_batch, peak_memory_bytes


def build(request, rank=0, world_size=1):
    return stage_module._build_trainer(request, Group(rank, world_size))


def times_of(trainer, step=0):
    """Recover the times of a batch: in a lone token's posterior they cannot be seen, so spy."""
    seen = []
    original = trainer.path.sample

    def note(x_1, t, *, uniform):
        seen.append(t)
        return original(x_1, t, uniform=uniform)

    trainer.path.sample = note
    trainer.noisy_batch(step)
    return seen[0].flatten(1)


def test_gradient_reaches_every_weight(make_request):
    trainer = build(make_request("async_finetune", prompt_dropout=0.0))
    trainer.step(0)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_step_moves_weights_and_average(make_request):
    trainer = build(make_request())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.step(0)
    for name, value in trainer.model.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert int(trainer.average.n_averaged) == 1


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_learns_what_it_learns_at_once(make_request, parts):
    whole = build(make_request("async_finetune"))
    in_parts = build(make_request("async_finetune", gradient_accumulation_steps=parts))
    calls = []
    norm = in_parts.model.model.norm
    norm.register_forward_pre_hook(lambda _norm, inputs: calls.append(len(inputs[0])))
    for step in range(3):
        one, other = whole.step(step), in_parts.step(step)
        for name in ("train/loss", "train/accuracy", "train/grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name
    assert calls[: len(calls) // 3] == {2: [2, 2], 3: [2, 2], 4: [1, 1, 1, 1]}[parts]
    for one, other in zip(whole.model.parameters(), in_parts.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_more_parts_than_samples_are_refused(make_request):
    with pytest.raises(ValueError, match="gradient_accumulation_steps 5 must be at most"):
        make_request("async_finetune", gradient_accumulation_steps=5)


def test_a_batch_is_a_function_of_its_step(make_request):
    request = make_request("async_finetune")
    one, other = build(request), build(request)
    one.noisy_batch(0)
    first, second = one.noisy_batch(3), other.noisy_batch(3)
    for name in ("text_ids", "x_1", "x_t"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.x_t, one.noisy_batch(4).x_t)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one(make_request, world_size):
    request = make_request("async_finetune", global_batch_size=8)
    alone = build(request).noisy_batch(2)
    parts = [build(request, rank, world_size).noisy_batch(2) for rank in range(world_size)]
    for name in ("text_ids", "x_1", "x_t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(alone, name))


def test_times_are_one_a_sample_or_one_a_frame(make_request):
    together = times_of(build(make_request("video_pretrain")))
    assert (together[:, 0] == together[:, 1]).all()
    assert len(together.unique()) == 4
    apart = times_of(build(make_request("async_finetune")))
    assert len(apart.unique()) == 8
    mixed = times_of(
        build(make_request("async_finetune", synchronous_fraction=0.5, global_batch_size=64))
    )
    assert 16 < int((mixed[:, 0] == mixed[:, 1]).sum()) < 48


def test_shift_means_more_noise(make_request):
    plain = times_of(build(make_request(timestep_shift=1.0)))
    # the stage's name and seed address the noise, not its settings
    shifted = times_of(build(make_request(timestep_shift=5.0)))
    assert (shifted < plain).all()


@pytest.mark.parametrize(
    ("dropout", "prefix", "expected"),
    [
        (1.0, 1.0, ["", ""]),
        (0.0, 0.0, ["a red ball rolls", "the night city"]),
        (0.0, 1.0, ["motion=9.5, a red ball rolls", "the night city"]),
    ],
)
def test_prompts(make_request, dropout, prefix, expected):
    trainer = build(make_request(prompt_dropout=dropout, motion_prefix_probability=prefix))
    batch = trainer.loader.batch(0, slice(0, 2))
    batch = type(batch)(
        batch.visual_ids, ("a red ball rolls", "the night city"), (9.5, None), batch.sample_ids
    )
    noisy = make_noisy_batch(
        batch,
        trainer.path,
        trainer.config,
        trainer.text_tokenizer,
        max_prompt_length=30,
        num_main_tokens=12,
        seeds=[1, 2],
    )
    assert [trainer.text_tokenizer.decode(ids.tolist()) for ids in noisy.text_ids] == expected
    assert torch.equal(noisy.x_1, batch.visual_ids)


@pytest.mark.parametrize("scaled", [True, False])
def test_larger_samples_are_noisier_where_the_shift_is_scaled(make_request, scaled):
    """The same draws with four times the tokens have the times of twice the shift."""
    trainer = build(make_request(timestep_shift=1.5, scale_shift=scaled))
    batch = trainer.loader.batch(0, slice(0, 4))
    num_tokens = math.prod(batch.visual_ids.shape[1:])

    def noisy(**changes):
        return make_noisy_batch(
            batch,
            trainer.path,
            trainer.config.model_copy(update=changes),
            trainer.text_tokenizer,
            max_prompt_length=8,
            num_main_tokens=num_tokens // 4,
            seeds=[1, 2, 3, 4],
        ).x_t

    shift = 3.0 if scaled else 1.5
    assert torch.equal(noisy(), noisy(timestep_shift=shift, scale_shift=False))
    assert not torch.equal(noisy(), noisy(timestep_shift=30.0, scale_shift=False))


def test_learning_rate_warms_up_and_falls(make_request):
    request = make_request(max_steps=10, warmup_steps=4, learning_rate=1.0, final_learning_rate=0.1)
    config = request.config.stages.video_pretrain
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(config, 99) == pytest.approx(0.1)


def test_average_forgets_its_start(make_request):
    request = make_request(ema_decay=0.9)
    model = torch.nn.Linear(1, 1, bias=False)
    average = build_average(model, request.config.stages.video_pretrain)
    value = None
    for step, weight in enumerate([1.0, 2.0, 4.0]):
        torch.nn.init.constant_(model.weight, weight)
        average.update_parameters(model)
        decay = min(0.9, (1 + step) / (10 + step))
        value = weight if value is None else decay * value + (1 - decay) * weight
    assert float(average.module.weight.detach()) == pytest.approx(value)


def in_blocks(request, group, num_threads):
    """Return a trainer whose data are many blocks of one shard each."""
    trainer = build(request, group.rank, group.world_size)
    trainer.loader.close()
    trainer.loader = MixedLoader(
        plan_parts([request.datasets.video_train], batch_size=trainer.config.global_batch_size),
        num_main_tokens=12,
        num_steps=trainer.config.max_steps,
        seed=7,
        block_bytes=1,
        num_threads=num_threads,
    )
    return trainer


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_samples_and_noise_do_not_depend_on_threads_and_ranks(
    make_request, num_threads, world_size
):
    request = make_request("async_finetune", global_batch_size=4, max_steps=9)
    alone = in_blocks(request, Group(0, 1), 1)
    ranks = [in_blocks(request, Group(rank, world_size), num_threads) for rank in range(world_size)]
    for step in (0, 1, 2, 3, 8, 5):  # the fourth step joins two epochs
        whole = alone.noisy_batch(step)
        parts = [rank.noisy_batch(step) for rank in ranks]
        for name in ("text_ids", "x_1", "x_t"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), (step, name)
    for trainer in (alone, *ranks):
        trainer.close()


def test_waiting_for_data_is_measured(make_request, monkeypatch):
    request = make_request(max_steps=3)
    read = storage.read_bytes

    def slowly(uri):
        time.sleep(0.2)
        return read(uri)

    with closing(build(request)) as trainer:
        monkeypatch.setattr(storage, "read_bytes", slowly)
        first, second = trainer.step(0), trainer.step(1)
    assert 0.2 <= first["train/data_wait_s"] <= first["train/step_s"]
    assert second["train/data_wait_s"] < 0.2  # the data set is one block and was read at once


def test_work_and_memory_of_a_step_are_measured(make_request):
    request = make_request(max_steps=2)
    with closing(build(request)) as trainer:
        metrics = trainer.step(0)
        clip = Clip((2, 2, 3), trainer.max_prompt_length)
        flops = 3 * 4 * forward_flops(trainer.model.config, clip)
    assert metrics["train/model_flops_per_s"] * metrics["train/step_s"] == pytest.approx(flops)
    held = bytearray(b"1") * 2**26
    assert len(held) < metrics["train/peak_memory_bytes"] <= peak_memory_bytes() < 2**37


@pytest.mark.usefixtures("no_threads_left")
def test_what_the_background_meets_stops_the_next_step(make_request, tmp_path):
    dataset = factories.write_dataset(str(tmp_path / "data"), "video", "train", 8)
    request = make_request(max_steps=9)
    datasets = request.datasets.model_copy(update={"video_train": dataset})
    request = request.model_copy(update={"datasets": datasets})
    with closing(in_blocks(request, Group(0, 1), 2)) as trainer:
        whole = trainer.loader.batch(0).sample_ids
    _, second = sorted(dataset.shards, key=lambda each: whole[0] not in names_of(each))
    storage.write_bytes(second.uri, b"damaged")
    with closing(in_blocks(request, Group(0, 1), 2)) as trainer:
        trainer.step(0)
        with pytest.raises(ShardFormatError, match=f"{second.uri}: sha256 is .*expected"):
            trainer.step(1)


def names_of(shard):
    return read_shard(shard, codebook_size=60)["sample_id"].to_pylist()
