import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests import factories
from ursa.diffusion import solver
from ursa.diffusion.timesteps import inference_times
from ursa.errors import ConfigError
from ursa.model import size
from ursa.model.size import (
    Clip,
    activation_bytes,
    forward_flops,
    latent_shape,
    num_parameters,
    num_sequences,
    plan,
    qwen3_config,
    saved_bytes,
)
from ursa.model.transformer import UrsaTransformer, build_transformer


def published_count(hidden, mlp, heads, key_value_heads, layers):
    """Add up the parameters that the published class declares, tensor by tensor."""
    layer = [
        (heads * 128, hidden),  # q_proj
        (key_value_heads * 128, hidden),  # k_proj
        (key_value_heads * 128, hidden),  # v_proj
        (hidden, heads * 128),  # o_proj
        (128,),  # q_norm
        (128,),  # k_norm
        (mlp, hidden),  # gate_proj
        (mlp, hidden),  # up_proj
        (hidden, mlp),  # down_proj
        (hidden,),  # input_layernorm
        (hidden,),  # post_attention_layernorm
    ]
    shapes = [(215_669, hidden), (hidden,), (64_000, hidden)] + layers * layer
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("0.6b", (1024, 3072, 16, 8, 28)),
        ("1.7b", (2048, 6144, 16, 8, 28)),
        ("4b", (2560, 9728, 32, 8, 36)),
    ],
)
def test_parameters_are_counted_exactly(size, shape):
    config = qwen3_config(size)
    started = time.perf_counter()
    with torch.device("meta"):
        model = UrsaTransformer(config)
    seconds = time.perf_counter() - started
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == num_parameters(config) == published_count(*shape)
    assert seconds < 60  # a drawn network of these sizes takes minutes


@pytest.mark.parametrize("changes", [{}, {"head_dim": 32, "num_attention_heads": 4}])
def test_parameters_of_a_small_network(changes):
    config = factories.transformer_config(**changes)
    built = sum(p.numel() for p in build_transformer(config, seed=0).parameters())
    assert built == num_parameters(config)


def test_tokens_of_the_paper():
    shape = latent_shape(49, 320, 512)
    assert shape == (13, 40, 64)
    clip = Clip(shape, 320)
    assert clip.num_visual_tokens == 33_280
    assert clip.num_tokens == 33_601
    assert latent_shape(1, 1024, 1024, temporal_stride=1, spatial_stride=16) == (1, 64, 64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((50, 320, 512), "num_frames must be 1 [+] 4k, got 50; the nearest are 49 and 53"),
        ((0, 320, 512), "num_frames must be 1 [+] 4k, got 0; the nearest is 1$"),
        ((49, 324, 512), "height must be divisible by 8, got 324; the nearest are 320 and 328"),
        ((49, 320, 4), "width must be divisible by 8, got 4; the nearest is 8$"),
        ((1, 320, 100_000), "width must be at most 8192, .*, got 100000$"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        latent_shape(*sizes)


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config, clip = factories.transformer_config(), Clip((2, 6, 7), 9)
    with torch.device("meta"):
        model = UrsaTransformer(config)
        text = torch.zeros(1, clip.prompt_length, dtype=torch.long)
        visual = torch.zeros(1, *clip.latent_shape, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text, visual)
    assert forward_flops(config, clip) == counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 128, "intermediate_size": 512}, {"hidden_size": 64, "head_dim": 64}],
    ids=["mlp", "attention"],
)
def test_activations_are_bounded_from_above_and_not_by_much(changes, dtype):
    """The peak that torch's allocator sees over a forward, the head being small.

    Where its attention takes keys and values without repeating them it stays further below.
    """
    config = factories.transformer_config(**changes)
    model = build_transformer(config, seed=0).eval().to(dtype)
    clip = Clip((2, 16, 20), 32)
    text = torch.zeros(1, 32, dtype=torch.long)
    visual = torch.zeros(1, *clip.latent_shape, dtype=torch.long)
    with torch.inference_mode():
        model(text, visual)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(text, visual)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    bound = activation_bytes(config, clip, num_sequences=1, bytes_per_value=dtype.itemsize)
    assert 0.65 * bound < peak <= bound


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"intermediate_size": 256}],
)
def test_what_training_keeps_is_counted_exactly(changes):
    """The storages that autograd holds after the forward pass, without the weights."""
    model = build_transformer(factories.transformer_config(**changes), seed=0)
    clip = Clip((2, 6, 8), 9)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []  # held, so that no two have the same address

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def saved(batch):
        kept.clear()
        text = torch.zeros(batch, 9, dtype=torch.long)
        visual = torch.zeros(batch, *clip.latent_shape, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.hidden_states(text, visual)
        stores = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept}
        assert hidden.requires_grad
        return sum(
            tensor.untyped_storage().nbytes()
            for place, tensor in stores.items()
            if place not in weights
        )

    assert saved(1) == saved_bytes(model.config, clip)
    assert 0.97 * 3 * saved_bytes(model.config, clip) < saved(3) <= 3 * saved(1)


@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 25, 50])
def test_sequences_are_those_of_the_sampler(steps, shift):
    run = inference_times(steps, shift)[1 if steps > 1 else 0 :]
    guided = int((run < 0.9).sum())
    assert num_sequences(steps, shift=shift, guidance_trunc=0.9) == len(run) + guided
    alone = num_sequences(steps, shift=shift, guidance_trunc=0.9, is_guided=False)
    assert alone == len(run)


def test_logits_at_once_are_those_of_the_sampler():
    assert size.LOGITS_AT_ONCE == solver._PART_ELEMENTS


def test_plan_adds_up():
    config, clip = qwen3_config("1.7b"), Clip((13, 40, 64), 320)
    guided = plan(config, clip, num_sequences=95, is_guided=True)
    single = plan(config, clip, num_sequences=50, is_guided=False, bytes_per_value=4)
    assert guided.code_tensor_bytes == 33_280 * 64_000 * 4
    assert guided.logits_bytes == 2 * 4 * 2**23
    assert guided.weight_bytes == 2 * guided.num_parameters
    assert guided.training_state_bytes == 20 * guided.num_parameters
    assert guided.sampling_flops == 95 * guided.forward_flops
    assert guided.inference_bytes == (
        guided.weight_bytes + guided.activation_bytes + guided.logits_bytes
    )
    assert single.weight_bytes == 2 * guided.weight_bytes
    assert single.logits_bytes == guided.logits_bytes
