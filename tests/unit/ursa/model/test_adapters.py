"""Adapters of low rank: what they change, how they are kept, and that peft reads them."""

import builtins
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests import factories
from ursa.config import LORA_TARGETS, LoraConfig
from ursa.errors import ConfigError
from ursa.generation import UrsaPipeline
from ursa.model import adapters
from ursa.model.adapters import SeededDropout, add_adapters, merge_adapter, merged_weights
from ursa.model.pretrained import load_transformer, save_transformer
from ursa.model.transformer import UrsaTransformer, build_transformer

CONFIGS = {
    "all": LoraConfig(rank=3),
    "two": LoraConfig(rank=2, alpha=1.0, target_modules=("q_proj", "down_proj")),
    "whole": LoraConfig(
        rank=3, target_modules=("v_proj",), whole_modules=("embed_tokens", "lm_head")
    ),
}


def network(dtype=torch.float32) -> UrsaTransformer:
    return build_transformer(factories.transformer_config(), seed=3).to(dtype)


def logits(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(50, (2, 5), generator=generator)
    visual = torch.randint(60, (2, 2, 2, 3), generator=generator)
    with torch.no_grad():
        return model.eval()(text, visual)


def trained(config: LoraConfig) -> UrsaTransformer:
    """A network whose adapters, and modules that are trained whole, are no longer as they began."""
    model = network()
    add_adapters(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def copied_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def written(model, config, folder):
    """The adapter of a network in a directory."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    adapters.save_adapter(state, config, folder, base="/models/base")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_changes_nothing_to_the_bit(name):
    config, plain, model = CONFIGS[name], network(), network()
    add_adapters(model, config, seed=0)
    assert torch.equal(logits(model), logits(plain))
    merged = merged_weights(copied_state(model), config)
    assert merged.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_only_adapters_and_whole_modules_are_trained(name):
    config, model = CONFIGS[name], network()
    add_adapters(model, config, seed=0)
    names = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {key for key in names if ".lora_" not in key}
    assert whole == (
        {"lm_head.weight", "model.embed_tokens.weight"} if config.whole_modules else set()
    )
    assert len(names - whole) == 2 * 2 * len(config.target_modules)  # A and B, two layers


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_compute_what_the_adapters_do(name):
    config = CONFIGS[name]
    model, plain = trained(config), network()
    before = logits(plain)
    plain.load_state_dict(merged_weights(copied_state(model), config))
    assert not torch.allclose(logits(plain), before, atol=1e-3)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_matrices():
    first, second, other = (network() for _ in range(3))
    state = torch.random.get_rng_state()
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        add_adapters(model, LoraConfig(rank=2), seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("error")
def test_peft_reads_what_is_written(tmp_path, name):
    config = CONFIGS[name]
    model = trained(config)
    folder = written(model, config, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    read = peft.PeftModel.from_pretrained(network(), str(folder))
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=0)
    # as peft itself would write it
    expected = peft.get_peft_model_state_dict(read, save_embedding_layers=False)
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "/models/base"
    )


def test_the_files_do_not_depend_on_the_process(tmp_path):
    """peft keeps the names of modules in sets, whose order is another in every process."""
    script = (
        "import sys; from pathlib import Path; from ursa.config import LoraConfig;"
        "from ursa.model.adapters import save_adapter;"
        "save_adapter({}, LoraConfig(), Path(sys.argv[1]), base=None)"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
    one, other = ((tmp_path / seed / "adapter_config.json").read_bytes() for seed in "12")
    assert one == other
    assert set(json.loads(one)["target_modules"]) == set(LORA_TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_into_a_directory(tmp_path, dtype):
    config = CONFIGS["whole"]
    model = trained(config)
    save_transformer(network(dtype), tmp_path / "base")
    merge_adapter(
        tmp_path / "base", written(model, config, tmp_path / "a"), tmp_path / "to" / "out"
    )
    merged = load_transformer(tmp_path / "to" / "out")
    assert merged.lm_head.weight.dtype == dtype
    expected = merged_weights(copied_state(model), config)
    for name, value in merged.state_dict().items():
        near = (
            {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        )
        torch.testing.assert_close(value.float(), expected[name], **near)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]


def test_a_model_directory_keeps_all_but_the_weights(tmp_path, exported_model):
    base = tmp_path / "base"
    UrsaPipeline.from_pretrained(exported_model.directory_uri).save_pretrained(base)
    (base / "adapter").mkdir()
    (base / "adapter" / "adapter_config.json").write_text("{}")
    config, model = CONFIGS["two"], load_transformer(base / "transformer")
    add_adapters(model, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    merge_adapter(base, written(model, config, tmp_path / "a"), tmp_path / "out")
    one, other = (UrsaPipeline.from_pretrained(tmp_path / name) for name in ("base", "out"))
    torch.testing.assert_close(logits(other.transformer), logits(model), rtol=1e-4, atol=1e-5)
    assert other.defaults == one.defaults
    files = {
        path.relative_to(base): path.read_bytes()
        for path in base.rglob("*")
        if path.is_file() and path.parent.name not in {"transformer", "adapter"}
    }
    assert len(files) > 5
    for path, data in files.items():
        assert (tmp_path / "out" / path).read_bytes() == data
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_cannot_be_merged_is_named(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_transformer(network(), base)
    good = written(trained(CONFIGS["two"]), CONFIGS["two"], tmp_path / "good")

    def changed(name, **values):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((good / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))
        (folder / "adapter_model.safetensors").write_bytes(
            (good / "adapter_model.safetensors").read_bytes()
        )
        return folder

    other = build_transformer(
        factories.transformer_config().model_copy(update={"intermediate_size": 48}), seed=0
    )
    save_transformer(other, tmp_path / "narrow")
    (tmp_path / "there").mkdir()
    for model, adapter, target, message in (
        (base, tmp_path / "gone", out, "no adapter at .*gone: adapter_config.json is missing"),
        (base, good, tmp_path / "there", "there exists; name a directory that does not"),
        (tmp_path / "gone", good, out, "no transformer at .*config.json is missing"),
        (base, changed("query", target_modules=["query"]), out,
         r"query.* not found.*; the matrices of the network are down_proj, gate_proj, k_proj, "
         "lm_head, o_proj, q_proj, up_proj, v_proj"),
        (base, changed("kind", peft_type="NOTHING"), out, "cannot be merged"),
        (tmp_path / "narrow", good, out, "size mismatch"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            merge_adapter(model, adapter, target)
        assert not out.exists()
    assert not list(tmp_path.glob(".merging-*"))


def test_without_peft_the_extra_is_named(monkeypatch, tmp_path):
    find, load = adapters.find_spec, builtins.__import__

    def no_peft(name, *arguments, **options):
        if name == "peft":
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setattr(builtins, "__import__", no_peft)
    message = r"needs peft, which is not installed; .*pip install 'ursa-pipeline\[lora\]'"
    with pytest.raises(ConfigError, match=f"^stages.x.lora {message}"):
        add_adapters(network(), LoraConfig(), seed=0, where="stages.x.lora")
    with pytest.raises(ConfigError, match=f"^ursa merge {message}"):
        merge_adapter(tmp_path, tmp_path, tmp_path / "out")


def test_masks_follow_from_seeds_alone():
    dropout = SeededDropout(0.25)
    values = torch.ones(2, 500, 8)
    dropout.seeds = [7, 9]
    both = dropout(values)
    torch.testing.assert_close(both.unique(), torch.tensor([0.0, 4 / 3]))
    assert (both == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(both[0], both[1])
    dropout.seeds = [9]
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(dropout(values[:1])[0], both[1])
    assert torch.equal(dropout.eval()(values), values)
