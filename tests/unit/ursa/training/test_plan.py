import math

import pytest
import torch

from tests import factories
from tests.bench.gpu import LM_VOCAB_SIZE, SHAPES, Bench
from ursa.config import LoraConfig, load_config
from ursa.data import order
from ursa.data.dataset import TokenSamples
from ursa.data.shards import shard_bytes
from ursa.diffusion import loss
from ursa.diffusion.grid import num_orbits
from ursa.errors import ConfigError
from ursa.model.adapters import add_adapters
from ursa.model.size import Clip, num_parameters
from ursa.model.transformer import UrsaTransformer
from ursa.training import plan as planning
from ursa.training import probe
from ursa.training import stage as stage_module
from ursa.training.checkpoint import training_state
from ursa.training.distributed import Group
from ursa.training.execution import Execution
from ursa.training.plan import (
    DataSize,
    Machine,
    plan_run,
    published_speed,
    run_network,
    stage_clip,
)

STAGE = "video_pretrain"


def one(config, machine=None, **changes):
    (result,) = plan_run(config, machine or Machine(name="m"), stages=(STAGE,), **changes)
    return result


def of_stage(**changes):
    return factories.tiny_config({"stages": {STAGE: changes}})


def test_logits_at_once_are_those_of_the_loss():
    assert planning.LOSS_PART_ELEMENTS == loss.PART_ELEMENTS
    assert planning.GPU_PART_ELEMENTS == loss.GPU_PART_ELEMENTS


def test_blocks_are_those_of_the_loader():
    assert planning.LOADER_BLOCKS_BYTES == 2 * order.BLOCK_BYTES


def test_state_is_that_of_the_trainer(make_request):
    request = make_request(STAGE)
    trainer = stage_module._build_trainer(request, Group(0, 1))
    trainer.step(0)
    found = one(request.config)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    # the plan cannot know how many of 300 text ids the captions fill
    assert run_network(request.config).vocab_size == trainer.model.config.vocab_size
    assert found.memory.weight_bytes == found.memory.average_bytes == weights
    assert found.memory.gradient_bytes == sum(p.grad.nbytes for p in trainer.model.parameters())
    state = training_state(trainer.model, trainer.average, trainer.optimizer)
    written = sum(value.nbytes for value in state.values())
    kept = request.config.stages.video_pretrain.keep_checkpoints + 1
    assert found.checkpoint_bytes == pytest.approx(kept * written, rel=0.01)
    assert 4 * weights == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("whole", [[], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_state_of_adapters_is_that_of_the_trainer(make_request, exported_model, whole):
    lora = {"rank": 3, "target_modules": ["k_proj", "gate_proj", "down_proj"]}
    request = make_request(
        STAGE,
        lora=lora | {"whole_modules": whole},
        init_from_uri=exported_model.directory_uri,
        gradient_accumulation_steps=2,
    )
    trainer = stage_module._build_trainer(request, Group(0, 1))
    trainer.step(0)
    found = one(request.config)
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert found.num_parameters == sum(p.numel() for p in parameters)
    assert found.num_trained == sum(p.numel() for p in trained)
    assert found.memory.weight_bytes == sum(p.nbytes for p in parameters)
    gradients = sum(p.grad.nbytes for p in trained)
    head = trainer.model.lm_head.weight.nbytes if whole else 0  # of the part in work
    assert found.memory.gradient_bytes == gradients + head
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if value.ndim
    ]
    assert found.memory.optimizer_bytes == sum(value.nbytes for value in moments)
    average = trainer.average.module.parameters()
    assert found.memory.average_bytes == sum(p.nbytes for p in average)
    state = training_state(trainer.trained, trainer.average, trainer.optimizer)
    plain = 4 * num_parameters(run_network(request.config))
    kept = request.config.stages.video_pretrain.keep_checkpoints + 1
    written = kept * sum(value.nbytes for value in state.values()) + plain
    assert found.checkpoint_bytes == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4), LoraConfig(target_modules=("o_proj",))])
def test_operations_of_layers_are_those_that_torch_counts(lora):
    """Of all but the first, which makes fewer gradients than is counted: of no states before it."""
    from torch.utils.flop_counter import FlopCounterMode

    clip, counts = Clip((2, 6, 8), 9), []
    for layers in (2, 4):
        config = factories.transformer_config(num_hidden_layers=layers)
        with torch.device("meta"):
            model = UrsaTransformer(config)
            text = torch.zeros(1, 9, dtype=torch.long)
            visual = torch.zeros(1, *clip.latent_shape, dtype=torch.long)
            if lora is not None:
                add_adapters(model, lora, seed=0)
            with FlopCounterMode(display=False) as counter:
                model.hidden_states(text, visual).sum().backward()
        planned, _ = planning.training_flops(config, clip, lora)
        counts.append((counter.get_total_flops(), planned))
        assert 0.7 * planned < counts[-1][0] <= planned
    (small, small_plan), (large, large_plan) = counts
    assert large - small == large_plan - small_plan


def test_a_head_that_is_not_trained_costs_two_products():
    config, clip = factories.transformer_config(), Clip((2, 6, 8), 9)
    _, forward = planning.split_flops(config, clip)
    for whole, products in (((), 2), (("embed_tokens",), 2), (("lm_head",), 3)):
        lora = LoraConfig(whole_modules=whole)
        assert planning.training_flops(config, clip, lora)[1] == products * forward


def test_adapters_take_less_memory_and_exchange_less():
    config = load_config("small", {"stages": {STAGE: {"lora": {}}}})
    h100 = planning.GPUS["h100"]
    for changes in ({}, {"num_workers": 4}):
        whole = one(load_config("small"), h100, **changes)
        adapters = one(config, h100, **changes)
        assert adapters.num_trained < 0.2 * whole.num_trained
        assert adapters.step_s < whole.step_s
        for part in ("gradient", "optimizer", "average", "activation", "total"):
            name = f"{part}_bytes"
            assert getattr(adapters.memory, name) < getattr(whole.memory, name), name
        assert adapters.flops < whole.flops
    sharded = one(config, num_workers=4, execution=Execution(strategy="fsdp")).memory
    assert sharded.total_bytes < one(config, num_workers=4).memory.total_bytes


def test_merging_can_be_the_fullest_moment():
    changes = {"model": {"hidden_size": 2048, "intermediate_size": 8192}}
    stage = {"lora": {"rank": 4}, "global_batch_size": 1}
    config = load_config("small", changes | {"stages": {STAGE: stage}})
    here, there = one(config).memory, one(config, planning.GPUS["h100"]).memory
    assert (here.moment, there.moment) == ("merge", "backward")
    assert here.checkpoint_bytes == here.weight_bytes


@pytest.mark.parametrize(
    ("batch", "parts", "workers"), [(4, 1, 1), (4, 3, 1), (8, 3, 2), (12, 5, 2), (4, 4, 4)]
)
def test_micro_batch_is_that_of_the_trainer(make_request, batch, parts, workers):
    request = make_request(STAGE, global_batch_size=batch, gradient_accumulation_steps=parts)
    trainer = stage_module._build_trainer(request, Group(0, workers))
    sizes = []
    trainer.model.model.norm.register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    trainer._add_gradients(trainer.noisy_batch(0))
    assert one(request.config, num_workers=workers).micro_batch == max(sizes)
    work = planning._work(request.config, STAGE, workers)
    assert work.num_parts == len(sizes)


def test_tokens_and_operations_add_up():
    config = load_config("tiny")
    found = one(config)
    settings = config.stages.video_pretrain
    length = 3 * 7 * 12 + 1 + config.text_tokenizer.max_prompt_length
    assert found.tokens_per_sample == length
    assert found.tokens_per_step == settings.global_batch_size * length
    assert found.num_tokens == settings.max_steps * found.tokens_per_step
    assert found.num_parameters == num_parameters(run_network(config))
    clip = stage_clip(config, STAGE)
    layers, head = planning.split_flops(run_network(config), clip)
    assert found.flops == 3 * found.num_samples * (layers + head)
    assert found.memory.total_bytes == sum(getattr(found.memory, name) for name in planning.PARTS)
    assert set(planning.PARTS) < set(found.memory.model_dump())


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (5, 5), (8, 8, 8, 5, 5), (7, 3, 2)])
def test_kinds_of_codes_are_the_orbits_of_the_grid(levels):
    config = factories.tiny_config({"visual_tokenizer": {"levels": levels}})
    expected = planning._TABLE_BYTES * num_orbits(levels) * math.prod(levels)
    assert planning.path_bytes(config) == expected


def test_more_parts_take_less_memory_and_more_workers_exchange():
    config = load_config("small")
    whole = one(config).memory
    changes = {"stages": {STAGE: {"gradient_accumulation_steps": 8}}}
    parts = one(load_config("small", changes)).memory
    assert parts.activation_bytes < whole.activation_bytes / 7
    assert parts.weight_bytes == whole.weight_bytes
    wide = {"model": {"hidden_size": 2048, "intermediate_size": 8192}}
    one_sample = {"stages": {STAGE: {"global_batch_size": 8, "gradient_accumulation_steps": 8}}}
    alone = one(load_config("small", one_sample | wide))
    many = one(load_config("small", one_sample | wide), num_workers=8)
    assert (alone.memory.moment, many.memory.moment) == ("backward", "exchange")
    assert many.micro_batch == alone.micro_batch == 1
    assert many.memory.gradient_bytes == 2 * many.memory.weight_bytes


def test_a_checkpoint_is_copied_to_the_memory_of_the_processor():
    config = load_config("small")
    here, there = one(config).memory, one(config, planning.GPUS["h100"]).memory
    assert here.checkpoint_bytes == 4 * here.weight_bytes
    assert there.checkpoint_bytes == there.loader_bytes == there.allocator_bytes == 0
    # states are counted alike: the preset trains in float32
    assert there.activation_bytes <= here.activation_bytes


H100 = {
    ("image", "attention"): (46.57, 1.42),
    ("image", "layer"): (21.81, 1.47),
    ("video", "mlp"): (68.19, 2.40),
    ("video", "attention"): (37.25, 2.98),
    ("video", "layer"): (19.20, 3.01),
}
"""GB and seconds a step that tests/bench/gpu.py has measured, not compiled (docs/results.md)."""


@pytest.mark.parametrize(("shape", "level"), H100)
def test_memory_of_a_gpu_is_within_a_quarter_of_what_one_was_seen_to_take(shape, level, tmp_path):
    bench = Bench("cpu", is_small=False, folder=tmp_path)
    config = bench.config(SHAPES[shape])
    config = load_config(
        "tiny",
        factories.merged(
            config.model_dump(mode="json"), {"text_tokenizer": {"vocab_size": LM_VOCAB_SIZE}}
        ),
    )
    execution = Execution(device="cuda", activation_checkpointing=level)
    found = one(config, planning.GPUS["h100"], execution=execution)
    measured, seconds = H100[shape, level]
    assert found.memory.total_bytes / 1e9 == pytest.approx(measured, rel=0.25)
    if shape == "video":  # of images a step is mostly norms, which no operation counts
        assert found.step_s == pytest.approx(seconds, rel=0.25)


def test_half_precision_takes_the_peak_of_half_precision():
    h100 = planning.GPUS["h100"]
    full, half = (published_speed(h100, precision=kind) for kind in ("float32", "bfloat16"))
    assert half.layer_flops / full.layer_flops == pytest.approx(989 / 67)
    assert "989 TFLOP/s in bfloat16 x 0.4" in half.source
    named = Machine(name="m", peak_flops=1e14)
    assert published_speed(named, precision="bfloat16") == published_speed(named)


def test_a_bucket_whose_batch_the_workers_cannot_share_is_named():
    bucket = {"num_frames": 17, "height_px": 96, "width_px": 96}
    changes = {"tokenization": {"extra_buckets": [bucket]}}
    config = load_config("tiny", changes)
    assert one(config, num_workers=1).problems == ()
    (problem,) = one(config, num_workers=8).problems
    assert "global_batch_size 8 is 2 for samples of a bucket with more tokens" in problem
    assert "leave that size out of tokenization.extra_buckets" in problem
    advice = int(problem.partition("global_batch_size=")[2].partition(",")[0])
    mended = load_config("tiny", changes | {"stages": {STAGE: {"global_batch_size": advice}}})
    assert one(mended, num_workers=8).problems == ()


def test_what_does_not_fit_is_said_and_the_advice_helps():
    config = load_config("small", {"stages": {STAGE: {"global_batch_size": 64}}})
    machine = Machine(name="small one", memory_bytes=800_000_000, process_bytes=300_000_000)
    (problem,) = one(config, machine).problems
    assert problem.startswith(f"{STAGE}: a worker needs ")
    assert "small one has 0.8 GB" in problem
    advice = int(problem.rpartition("gradient_accumulation_steps=")[2])
    changes = {"global_batch_size": 64, "gradient_accumulation_steps": advice}
    assert one(load_config("small", {"stages": {STAGE: changes}}), machine).problems == ()
    changes["gradient_accumulation_steps"] = advice - 1
    assert one(load_config("small", {"stages": {STAGE: changes}}), machine).problems


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"model": {"num_layers": 4000}, "tokenization": {"num_frames": 1}}, "smaller model"),
        ({"tokenization": {"num_frames": 4001}}, "smaller tokenization.num_frames"),
    ],
)
def test_what_no_batch_makes_fit(changes, advice):
    machine = Machine(name="m", memory_bytes=4_000_000_000, process_bytes=300_000_000)
    (problem,) = one(load_config("small", changes), machine).problems
    assert advice in problem


def test_a_batch_that_cannot_be_shared():
    (problem,) = one(of_stage(global_batch_size=8), num_workers=3).problems
    assert "global_batch_size 8 must be divisible by the 3 workers" in problem
    assert "=6 or 9" in problem
    with pytest.raises(ConfigError, match="num_workers must be at least 1, got 0"):
        one(of_stage(), num_workers=0)


def test_data_give_epochs_and_bytes(make_request):
    request = make_request(STAGE)
    config, clip = request.config, stage_clip(request.config, STAGE)
    samples = TokenSamples(request.datasets.video_train)
    count = {"image": len(samples), "video": len(samples)}
    data = DataSize(num_clips=1, num_train=count, num_validation={}, num_tokens=1)
    found = one(config, data=data)
    assert found.num_epochs == found.num_samples / len(samples)
    assert found.memory.loader_bytes - one(config).memory.loader_bytes >= samples._ids.nbytes
    assert clip.latent_shape == request.datasets.video_train.latent_shape
    none = DataSize(
        num_clips=0, num_train={"image": 0, "video": 0}, num_validation={}, num_tokens=0
    )
    assert "hold no video sample" in one(config, data=none).problems[0]


def test_shards_are_not_larger_than_planned():
    config = factories.tiny_config()
    count = 200
    rows = {name: factories.token_rows(name, count) for name in ("image", "video")}
    written = sum(len(shard_bytes(each, codebook_size=60)) for each in rows.values())
    counts = {"image": count, "video": count}
    num_tokens = sum(len(row["visual_ids"]) for each in rows.values() for row in each)
    data = DataSize(num_clips=1, num_train=counts, num_validation={}, num_tokens=num_tokens)
    assert 0.1 < written / planning.token_bytes(config, data) < 1


def test_published_rates():
    config = load_config("small")
    h100 = planning.GPUS["h100"]
    found = one(config, h100)
    assert found.problems == ()
    clip, settings = stage_clip(config, STAGE), config.stages.video_pretrain
    operations = (
        3 * settings.global_batch_size * sum(planning.split_flops(run_network(config), clip))
    )
    assert found.step_s > operations / (h100.peak_flops * planning.UTILISATION)
    assert found.worker_hours == found.step_s * settings.max_steps / 3600
    assert one(config, Machine(name="m")).step_s is None
    four = one(config, h100, num_workers=4)
    assert four.step_s < found.step_s < 4 * four.step_s


def test_a_probe_is_cut_to_what_takes_seconds():
    config = load_config("small")
    whole = run_network(config), stage_clip(config, STAGE), 8
    assert probe._cut(*whole) == whole
    huge = whole[0].model_copy(update={"hidden_size": 4096, "intermediate_size": 12288})
    network, clip, batch = probe._cut(huge, Clip((13, 40, 64), 320), 4)
    layers, head = planning.split_flops(probe._of_depth(network, 3), clip)
    assert batch == 1
    assert 3 * (layers + head) <= probe._MAX_FLOPS or clip.num_tokens < 64
    assert network.hidden_size == 4096


def test_noise_of_a_probe_makes_no_part_vanish():
    assert probe._split(3.0, 5.0, layer=1.0, rest=2.0) == (1.0, 2.0)
    # the deeper one was faster: five parts of work took 2 s
    assert probe._split(3.0, 2.0, layer=1.0, rest=2.0) == pytest.approx((0.04, 2.96))
    assert probe._split(1.0, 5.0, layer=1.0, rest=2.0) == pytest.approx((2.0, 0.2))


def test_a_probe_measures_rates():
    config = factories.tiny_config()
    stage = config.stages.video_pretrain
    speed = probe.measure_speed(run_network(config), stage_clip(config, STAGE), 4, stage)
    assert speed.source.startswith("measured here")
    assert 1e5 < speed.layer_flops < 1e15
    found = one(config, speeds={STAGE: speed})
    assert 1e-4 < found.step_s < 10


def test_shards_and_what_is_computed_again_take_less_memory_and_more_time():
    config = load_config("small", {"model": {"num_layers": 16}})
    machine = Machine(name="x", peak_flops=1e12)
    plain, again = (
        one(config, machine, num_workers=4, execution=Execution(activation_checkpointing=level))
        for level in ("none", "layer")
    )
    assert again.memory.activation_bytes < plain.memory.activation_bytes / 3
    assert plain.step_s < again.step_s < 4 / 3 * plain.step_s
    sharded = one(config, machine, num_workers=4, execution=Execution(strategy="fsdp"))
    assert sharded.memory.optimizer_bytes == pytest.approx(plain.memory.optimizer_bytes / 4)
    assert sharded.memory.average_bytes == pytest.approx(plain.memory.average_bytes / 4)
    assert sharded.memory.total_bytes < plain.memory.total_bytes
    # one worker has nothing to share out
    alone = one(config, machine, execution=Execution(strategy="fsdp"))
    assert alone.memory == one(config, machine).memory
