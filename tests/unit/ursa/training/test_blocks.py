"""Layers that keep less, are compiled or multiply in bfloat16."""

import gc
import os
import subprocess
import sys
import warnings
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests import factories
from ursa.config import LoraConfig
from ursa.errors import ConfigError
from ursa.model.adapters import add_adapters, dropouts
from ursa.model.size import Clip, Recomputed, recomputed_flops, saved_bytes
from ursa.model.transformer import build_transformer
from ursa.training import stage as stage_module
from ursa.training.blocks import checkpoint_activations, compile_layers
from ursa.training.checkpoint import training_state
from ursa.training.distributed import Group
from ursa.training.execution import Execution

LEVELS = get_args(Recomputed)


def build(request, **options):
    return stage_module._build_trainer(request, Group(0, 1), Execution(**options))


def state(trainer):
    return training_state(trainer.trained, trainer.average, trainer.optimizer)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_what_is_computed_again_is_equal_to_the_bit(make_request, level, precision):
    request = make_request("async_finetune", precision=precision, gradient_accumulation_steps=2)
    plain, again = build(request), build(request, activation_checkpointing=level)
    for step in range(3):
        assert again.step(step)["train/loss"] == plain.step(step)["train/loss"]
    for (name, one), other in zip(state(plain).items(), state(again).values(), strict=True):
        assert torch.equal(one, other), name


def test_the_average_does_not_share_its_layers_with_the_network(make_request):
    trainer = build(make_request(), activation_checkpointing="layer")
    batch = trainer.noisy_batch(0)
    before = trainer.average.module.hidden_states(batch.text_ids, batch.x_t)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert torch.equal(trainer.average.module.hidden_states(batch.text_ids, batch.x_t), before)


def bytes_left(model, level, clip) -> int:
    """What a forward pass allocates and does not free, but the states, which are the loss's."""
    checkpoint_activations(model, level)
    text = torch.zeros(1, clip.prompt_length, dtype=torch.long)
    visual = torch.zeros(1, *clip.latent_shape, dtype=torch.long)
    model.hidden_states(text, visual)
    gc.collect()  # networks of before are in cycles: to free them here would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden = model.hidden_states(text, visual)
    assert hidden.requires_grad
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") - hidden.nbytes


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_forward_pass_leaves_is_counted_exactly(level):
    clip = Clip((2, 12, 16), 9)
    model = build_transformer(factories.transformer_config(), seed=0)
    assert bytes_left(model, level, clip) == saved_bytes(model.config, clip, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, dropout=0.1),
        LoraConfig(rank=4, target_modules=("q_proj", "v_proj")),
        LoraConfig(rank=4, target_modules=("down_proj",), whole_modules=("embed_tokens",)),
    ],
    ids=["all", "dropout", "attention", "down"],
)
def test_a_layer_with_adapters_leaves_what_is_counted(level, lora):
    """The first one leaves less: nothing before it is trained."""
    clip, left, counted = Clip((2, 12, 16), 9), [], []
    for layers in (2, 4):
        config = factories.transformer_config(num_hidden_layers=layers)
        model = build_transformer(config, seed=0)
        add_adapters(model, lora, seed=0)
        for dropout in dropouts(model).values():
            dropout.seeds = [1]
        left.append(bytes_left(model, level, clip))
        counted.append(saved_bytes(config, clip, level, lora))
        assert left[-1] <= counted[-1]
    # numbers by which adapters are scaled, some bytes each, are left out
    assert left[1] - left[0] == pytest.approx(counted[1] - counted[0], abs=512)


def test_levels_keep_less_and_compute_more():
    config, clip = factories.transformer_config(), Clip((2, 6, 8), 9)
    kept = [saved_bytes(config, clip, level) for level in LEVELS]
    work = [recomputed_flops(config, clip, level) for level in LEVELS]
    assert kept == sorted(set(kept), reverse=True)
    assert work == sorted(work)


def test_bfloat16_trains_and_the_state_is_float32(make_request):
    changes = {"max_steps": 30, "learning_rate": 1e-2}
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = build(make_request("async_finetune", precision=precision, **changes))
        losses[precision] = [trainer.step(step)["train/loss"] for step in range(30)]
        for name, value in state(trainer).items():
            assert value.dtype == (torch.int64 if name == "ema_num_averaged" else torch.float32)
            assert torch.isfinite(value).all(), name
    exact, rough = losses["float32"], losses["bfloat16"]
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)
    # four samples of noise a step: means over steps tell
    assert sum(rough[-10:]) < sum(rough[:10]) - 1.0


def can_compile() -> bool:
    try:
        compile_layers(build_transformer(factories.transformer_config(), seed=0))
    except ConfigError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", ["none", "mlp", "layer"])
def test_compiled_layers_learn_the_same(make_request, level):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own compiler
        if not can_compile():
            pytest.skip("torch.compile needs a C++ compiler")
        request = make_request("async_finetune", max_steps=4)
        plain = build(request)
        compiled = build(request, compile_layers=True, activation_checkpointing=level)
        for step in range(4):
            expected = plain.step(step)["train/loss"]
            assert compiled.step(step)["train/loss"] == pytest.approx(expected, rel=1e-5)
    one, other = state(plain), state(compiled)
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_layers_with_adapters_learn_the_same(make_request, exported_model):
    """Masks are drawn outside of what is compiled, from other seeds every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own compiler
        if not can_compile():
            pytest.skip("torch.compile needs a C++ compiler")
        request = make_request(
            lora={"rank": 2, "dropout": 0.2}, init_from_uri=exported_model.directory_uri
        )
        plain, compiled = build(request), build(request, compile_layers=True)
        for step in range(4):
            expected = plain.step(step)["train/loss"]
            assert compiled.step(step)["train/loss"] == pytest.approx(expected, rel=1e-5)
    for (name, value), other in zip(state(plain).items(), state(compiled).values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", ["attention", "layer"])
def test_what_is_computed_again_is_compiled(level):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own compiler
        if not can_compile():
            pytest.skip("torch.compile needs a C++ compiler")
        model = build_transformer(factories.transformer_config(), seed=0)
        checkpoint_activations(model, level)
        compile_layers(model)
        text, visual = (torch.zeros(1, *shape, dtype=torch.long) for shape in ((9,), (2, 4, 4)))
        model.hidden_states(text, visual).sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model.hidden_states(text, visual).sum().backward()
    names = {event.name for event in profiler.events()}
    assert any("Compiled" in name for name in names)
    assert "aten::silu" not in names, "the MLPs run operation by operation"


def test_without_a_compiler_the_error_says_what_to_do(tmp_path):
    script = """
from tests import factories
from ursa.config import LoraConfig
from ursa.errors import ConfigError
from ursa.model.adapters import add_adapters, dropouts
from ursa.model.transformer import build_transformer
from ursa.training.blocks import compile_layers
try:
    compile_layers(build_transformer(factories.transformer_config(), seed=0))
except ConfigError as error:
    print(error)
"""
    environment = os.environ | {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert "torch.compile does not work on this machine for cpu" in done.stdout
    assert "install a C++ compiler and set CXX to it, or set URSA_COMPILE_LAYERS=0" in done.stdout
