"""Stages that train adapters: what is trained, kept, published, and how the next one begins."""

import json
import math

import peft
import pytest
import torch

from tests import factories
from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE
from ursa.config import LoraConfig, load_config
from ursa.errors import ConfigError, NonFiniteLossError
from ursa.generation import UrsaPipeline
from ursa.model.adapters import merge_adapter
from ursa.model.pretrained import load_transformer
from ursa.release import export_model
from ursa.training import stage as stage_module
from ursa.training.checkpoint import load_checkpoint
from ursa.training.distributed import Group
from ursa.training.execution import Execution
from ursa.training.samples import StageSamples, step_folder
from ursa.training.stage import find_stage, load_average, train_stage

LORA = {"rank": 4, "dropout": 0.1}
WHOLE = LORA | {"target_modules": ["q_proj", "down_proj"], "whole_modules": ["lm_head"]}
FAST = {"learning_rate": 3e-2, "final_learning_rate": 3e-2, "warmup_steps": 1, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def parent(tiny_data, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("parent"))
    return train_stage(factories.stage_request(tiny_data, "image_pretrain", uri, max_steps=2))


@pytest.fixture
def make_lora_request(make_request, parent):
    def make(**changes):
        settings = {"lora": LORA, "init_from": parent} | FAST | changes
        return make_request("video_pretrain", **settings)

    return make


def begun(request, ranks=1, rank=0, **options):
    return stage_module._build_trainer(request, Group(rank, ranks), Execution(**options))


def state_of(uri):
    return load_checkpoint(uri)[1]


def is_trained(name):
    return ".lora_" in name


@pytest.mark.parametrize("lora", [LORA, WHOLE])
def test_checkpoints_hold_what_is_trained_and_nothing_else(make_lora_request, parent, lora):
    done = train_stage(make_lora_request(lora=lora))
    state = state_of(done.uri)
    names = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    whole = {name for name in names if not is_trained(name)}
    assert whole == ({"lm_head.weight"} if lora is WHOLE else set())
    assert {name.removeprefix("ema.") for name in state if name.startswith("ema.")} == names
    moments = {"optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"}
    assert {name for name in state if name.startswith("optimizer.")} == {
        f"{moment}.{name}" for moment in moments for name in names
    }
    # every one of them was trained
    start = begun(make_lora_request(lora=lora)).trained.state_dict()
    for name in names:
        assert not torch.equal(state[f"model.{name}"], start[name]), name


@pytest.mark.parametrize("lora", [LORA, WHOLE])
def test_the_published_weights_are_the_average_with_its_adapters(make_lora_request, parent, lora):
    request = make_lora_request(lora=lora)
    done = train_stage(request)
    merged, average = state_of(done.merged_uri), state_of(done.uri)
    base = state_of(parent.uri)
    assert {name.removeprefix("ema.") for name in merged} == load_average(
        done, request
    ).state_dict().keys()
    scale = LoraConfig.model_validate(lora).alpha / lora["rank"]
    changed = 0
    for name, value in merged.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_B.default.weight" in average:
            b, a = (average[f"{stem}.lora_{part}.default.weight"] for part in "BA")
            torch.testing.assert_close(value, base[name] + scale * b @ a)
            assert not torch.equal(value, base[name])
            changed += 1
        else:
            assert torch.equal(value, average.get(name, base[name])), name
    assert changed == 2 * len(LoraConfig.model_validate(lora).target_modules)


def test_peft_puts_the_adapter_on_the_weights_that_it_began_with(make_lora_request, parent):
    request = make_lora_request(lora=WHOLE)
    done = train_stage(request)
    folder = storage.local_path(done.merged_uri) / "adapter"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == parent.uri == done.parent_uri
    read = peft.PeftModel.from_pretrained(load_average(parent, request), str(folder))
    result = read.merge_and_unload()
    for name, value in load_average(done, request).state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value)


def test_validation_measures_what_is_published(make_lora_request, tiny_data):
    """The average is put in the place of the weights, and they come back to the bit."""
    request = make_lora_request(validate_every=3)
    trainer = begun(request)
    for step in range(3):
        trainer.step(step)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    averages = trainer.average.module.state_dict()
    with trainer.averaged_model() as model:
        for name, value in model.state_dict().items():
            assert torch.equal(value, averages.get(name, before[name])), name
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    done = train_stage(request)
    plain = load_average(done, request)
    validation = stage_module._Validation(request, trainer)
    assert validation._grid(model=plain).mean_loss == pytest.approx(
        done.metrics["val/loss"], rel=1e-5
    )
    assert done.metrics["val/raw_loss"] != done.metrics["val/loss"]


class InterruptedRunError(Exception):
    """Stands for the death of the process in the middle of a stage."""


def test_resumed_run_is_equal_to_the_bit(make_lora_request):
    whole = train_stage(make_lora_request(output="a", lora=WHOLE))
    request = make_lora_request(output="b", lora=WHOLE)

    def stop(step, _metrics):
        if step == 5:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        train_stage(request, on_metrics=stop)
    steps: list[int] = []
    resumed = train_stage(request, on_metrics=lambda step, _: steps.append(step))
    assert steps == [4, 5, 6]
    assert resumed.metrics == whole.metrics
    for part in ("uri", "merged_uri"):
        one, other = (state_of(getattr(done, part)) for done in (resumed, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    folders = [storage.local_path(done.merged_uri) / "adapter" for done in (resumed, whole)]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert find_stage(request) == resumed


@pytest.mark.parametrize("level", ["none", "mlp", "attention", "layer"])
def test_masks_have_addresses(make_lora_request, level):
    """Parts, ranks and what is computed again change nothing but the order of sums."""
    plain = begun(make_lora_request())
    straight = plain.step(0)
    for other in (
        begun(make_lora_request(gradient_accumulation_steps=3)),
        begun(make_lora_request(), activation_checkpointing=level),
    ):
        assert other.step(0)["train/loss"] == pytest.approx(straight["train/loss"], rel=1e-6)
        for (name, value), found in zip(
            plain.trained.named_parameters(), other.trained.parameters(), strict=True
        ):
            torch.testing.assert_close(found.grad, value.grad, rtol=1e-4, atol=1e-7, msg=name)
    # the first step has no loss in which masks are seen: B is zero
    second = plain.step(1)["train/loss"]
    without = begun(make_lora_request(lora=LORA | {"dropout": 0.0}))
    without.step(0)
    assert without.step(1)["train/loss"] != second


def test_a_step_that_is_not_finite_is_skipped_and_the_stage_goes_back(
    make_lora_request, monkeypatch
):
    request = make_lora_request(max_steps=8, checkpoint_every=2)
    add = stage_module.Trainer._add_gradients
    calls = []

    def spoilt(self, batch):
        calls.append(None)
        return add(self, batch) * (torch.nan if len(calls) in {4, 5, 6} else 1)

    monkeypatch.setattr(stage_module.Trainer, "_add_gradients", spoilt)
    done = train_stage(request)
    marker, state = load_checkpoint(done.uri)
    assert marker.skipped.steps == (3, 4, 5)
    assert marker.skipped.taken_back == (2, 6)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    monkeypatch.setattr(
        stage_module.Trainer, "_add_gradients", lambda self, batch: add(self, batch) * torch.nan
    )
    with pytest.raises(NonFiniteLossError, match="not finite again"):
        train_stage(make_lora_request(output="other"))


def test_the_next_stage_starts_from_the_merged_weights_and_knows_no_adapter(
    make_lora_request, make_request, monkeypatch
):
    first = train_stage(make_lora_request())
    monkeypatch.setattr("ursa.model.adapters.find_spec", lambda _: None)  # nor needs peft
    request = make_request("async_finetune", init_from=first)
    start = begun(request).model.state_dict()
    for name, value in state_of(first.merged_uri).items():
        assert torch.equal(start[name.removeprefix("ema.")], value), name
    done = train_stage(request)
    assert (done.parent_uri, done.merged_uri) == (first.merged_uri, None)


def test_samples_show_what_is_published_and_change_nothing(
    make_lora_request, make_request, tmp_path
):
    straight = train_stage(make_lora_request(output="straight"))
    request = make_lora_request(sample_every=3)
    done = train_stage(request)
    one, other = (state_of(each.merged_uri) for each in (straight, done))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    plain = make_request("video_pretrain", init_from=done)
    StageSamples(plain, begun(plain), str(tmp_path / "plain")).draw(6)
    drawn, expected = (
        storage.local_path(step_folder(uri, 6)) / SAMPLES_PICTURE
        for uri in (stage_module.samples_uri(request), str(tmp_path / "plain"))
    )
    assert drawn.read_bytes() == expected.read_bytes()


def test_adapters_stack(make_lora_request, make_request):
    first = train_stage(make_lora_request())
    request = make_request("async_finetune", init_from=first, lora=WHOLE, **FAST)
    second = train_stage(request)
    base, result = load_average(first, request), load_average(second, request)
    folder = storage.local_path(second.merged_uri) / "adapter"
    peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    merged = peft.PeftModel.from_pretrained(load_average(first, request), str(folder))
    for name, value in merged.merge_and_unload().state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value)


def test_an_exported_model_is_plain_and_has_the_adapter_beside_it(
    make_lora_request, exported_model, tmp_path
):
    request = make_lora_request(init_from=None, init_from_uri=exported_model.directory_uri)
    done = train_stage(request)
    model = export_model(request, done, output_uri=request.output_uri)
    pipeline = UrsaPipeline.from_pretrained(model.directory_uri)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, state_of(done.merged_uri)[f"ema.{name}"]), name
    folder = storage.local_path(model.directory_uri)
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    } < model.sha256.keys()
    # base + adapter, as someone has it who was given the adapter alone
    base = storage.local_path(exported_model.directory_uri)
    merge_adapter(base, folder / "adapter", tmp_path / "merged")
    for name, value in load_transformer(tmp_path / "merged" / "transformer").state_dict().items():
        torch.testing.assert_close(pipeline.transformer.state_dict()[name], value)


def test_random_weights_are_refused(make_request):
    with pytest.raises(
        ConfigError, match=r"stages: .*image_pretrain.lora needs image_pretrain.init_from: without"
    ):
        load_config("tiny", {"stages": {"image_pretrain": {"lora": {}}}})
    with pytest.raises(ConfigError, match=r"stages.video_pretrain.lora needs a stage before or"):
        train_stage(make_request("video_pretrain", lora={}))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["query"]}, r"lora.target_modules.0: Input should be 'q_proj', 'k_proj'"
         ", 'v_proj', 'o_proj', 'gate_proj', 'up_proj' or 'down_proj'"),
        ({"target_modules": []}, "lora: .*target_modules must name one of q_proj, k_proj"),
        ({"target_modules": ["q_proj", "q_proj"]}, "target_modules names one twice"),
        ({"whole_modules": ["norm"]}, "Input should be 'embed_tokens' or 'lm_head'"),
        ({"rank": 0}, "lora.rank: Input should be greater than or equal to 1"),
        ({"dropout": 1.0}, "lora.dropout: Input should be less than 1"),
        ({"rnk": 4}, "lora.rnk: unknown key; did you mean 'rank'?"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_named(lora, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config("tiny", {"stages": {"async_finetune": {"lora": lora}}})


def test_the_run_refuses_to_begin_without_peft(monkeypatch):
    from tasks.context import check_adapters

    config = load_config("tiny", {"stages": {"async_finetune": {"lora": {}}}})
    check_adapters(config)
    monkeypatch.setattr("ursa.model.adapters.find_spec", lambda _: None)
    check_adapters(load_config("tiny"))
    with pytest.raises(ConfigError, match=r"stages.async_finetune.lora needs peft"):
        check_adapters(config)


def test_it_learns_on_a_model_that_has_learned(tiny_data, make_lora_request, tmp_path):
    """Images first, all weights; then videos, with adapters alone."""
    changes = {"max_steps": 60, "checkpoint_every": 60, "validate_every": 60, "log_every": 60}
    base = train_stage(
        factories.stage_request(
            tiny_data, "image_pretrain", str(tmp_path), **(FAST | {"learning_rate": 1e-2} | changes)
        )
    )
    request = make_lora_request(init_from=base, **changes)
    trainer = begun(request)
    before = stage_module._Validation(request, trainer)._grid().mean_loss
    after = train_stage(request).metrics["val/loss"]
    # better than knowing nothing, which the weights that it stands on are not
    assert after < math.log(factories.CODEBOOK_SIZE) - 0.2 < before
