import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import factories
from ursa.errors import ConfigError
from ursa.model.pretrained import (
    WEIGHTS_FILE,
    init_from_qwen3,
    load_transformer,
    save_transformer,
)
from ursa.model.sequence import block_causal_mask
from ursa.model.transformer import build_transformer

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


@pytest.fixture(scope="module")
def model():
    return build_transformer(factories.transformer_config(), seed=0)


def assert_equal(first, second, dtype=None):
    expected = first.state_dict()
    actual = second.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == (dtype or value.dtype)
        assert torch.equal(actual[name], value.to(actual[name].dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 9_000, 1])
def test_round_trip_to_the_bit(model, tmp_path, dtype, max_shard_bytes):
    first = build_transformer(model.config, seed=0).to(dtype)
    save_transformer(first, tmp_path, max_shard_bytes=max_shard_bytes)
    again = load_transformer(tmp_path)
    assert_equal(first, again, dtype)
    assert again.config == model.config
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    names = {path.name for path in tmp_path.iterdir()}
    if max_shard_bytes == 5_000_000_000:
        assert names == {"config.json", WEIGHTS_FILE}
        return
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = set(index["weight_map"].values())
    assert names == {"config.json", INDEX_FILE, *shards}
    sizes = [sum(v.nbytes for v in load_file(tmp_path / name).values()) for name in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert len(shards) > 2
    largest = max(value.nbytes for value in first.state_dict().values())
    assert max(sizes) <= max(max_shard_bytes, largest)
    assert f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors" in shards


def test_type_and_device_are_as_asked(model, tmp_path):
    save_transformer(model, tmp_path)
    assert_equal(model, load_transformer(tmp_path, dtype=torch.bfloat16), torch.bfloat16)
    on_meta = load_transformer(tmp_path, device="meta")
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


def test_configuration_has_the_published_keys(model, tmp_path):
    save_transformer(model, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    config = model.config.model_copy(update={"head_dim": 128, "rms_norm_eps": 1e-6})
    save_transformer(build_transformer(config, seed=0), tmp_path / "published")
    published = json.loads((tmp_path / "published" / "config.json").read_text())
    assert published == {
        "_class_name": "URSATransformer3DModel",
        "_diffusers_version": "0.35.2",
        "bov_token_id": 49,
        "hidden_size": 32,
        "intermediate_size": 64,
        "lm_head_size": 60,
        "lm_vocab_size": 50,
        "max_window_layers": 2,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rope_theta": 100.0,
        "vocab_size": 110,
    }
    # another head size is written, since it is not what the published class assumes
    assert ours == published | {"head_dim": 16}


def test_saving_over_another_model_leaves_no_trace_of_it(model, tmp_path):
    save_transformer(model, tmp_path, max_shard_bytes=9_000)
    (tmp_path / "notes.txt").write_text("mine")
    other = build_transformer(model.config, seed=1)
    loaded = load_transformer(tmp_path)
    save_transformer(other, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", WEIGHTS_FILE, "notes.txt"}
    assert_equal(other, load_transformer(tmp_path))
    assert_equal(model, loaded)  # what was read does not hang on the file
    mode = (tmp_path / "config.json").stat().st_mode
    assert stat.S_IMODE((tmp_path / WEIGHTS_FILE).stat().st_mode) == stat.S_IMODE(mode)


def test_a_save_that_fails_leaves_the_old_model(model, tmp_path, monkeypatch):
    """The disk is full while the second shard is written."""
    save_transformer(model, tmp_path)
    written = []

    def full(*arguments, **options):
        written.append(arguments)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("ursa.model.pretrained.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_transformer(build_transformer(model.config, seed=1), tmp_path, max_shard_bytes=9_000)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS_FILE}
    assert_equal(model, load_transformer(tmp_path))


@pytest.mark.parametrize("moved", range(4))
def test_a_save_that_is_killed_while_it_moves_files_is_no_model(
    model, tmp_path, monkeypatch, moved
):
    """Whatever was moved, the directory is refused until config.json comes last."""
    save_transformer(model, tmp_path)
    count = 0
    replace = type(tmp_path).replace

    def killed(self, target):
        nonlocal count
        if count == moved:
            raise KeyboardInterrupt
        count += 1
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", killed)
    other = build_transformer(model.config, seed=1)
    with pytest.raises(KeyboardInterrupt):
        save_transformer(other, tmp_path, max_shard_bytes=9_000)
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_transformer(tmp_path)
    monkeypatch.undo()
    save_transformer(other, tmp_path)
    assert_equal(other, load_transformer(tmp_path))


def rewritten(directory, change):
    path = directory / WEIGHTS_FILE
    state = load_file(path)
    change(state)
    save_file(state, path)


def edited(directory, name, change):
    values = json.loads((directory / name).read_text())
    change(values)
    (directory / name).write_text(json.dumps(values))


NORM = "model.norm.weight"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "no json": (lambda d: (d / "config.json").write_text("{"), r"config\.json refused"),
    "key": (lambda d: edited(d, "config.json", lambda c: c.update(depth=3)), "depth: Extra"),
    "class": (lambda d: edited(d, "config.json", lambda c: c.update(_class_name="X")), "got 'X'"),
    "no weights": (lambda d: (d / WEIGHTS_FILE).unlink(), r"no weights .* expected diffusion"),
    "cut": (lambda d: (d / WEIGHTS_FILE).write_bytes(b"1234567"), "missing or damaged"),
    "missing": (lambda d: rewritten(d, lambda s: s.pop(NORM)), f"missing: {NORM}"),
    "unexpected": (
        lambda d: rewritten(d, lambda s: s.update({f"extra{i}": s[NORM].clone() for i in "12345"})),
        "unexpected: extra1, extra2, extra3, extra4 and 1 more",
    ),
    "shape": (
        lambda d: rewritten(d, lambda s: s.update({NORM: torch.ones(31)})),
        rf"{NORM} must be floating point of shape \(32,\), got torch.float32 \(31,\)",
    ),
    "type": (
        lambda d: rewritten(d, lambda s: s.update({NORM: torch.ones(32, dtype=torch.int8)})),
        "got torch.int8",
    ),
    "two": (lambda d: (d / "model.safetensors").write_bytes(b""), "more than one set of weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named(model, tmp_path, damage):
    change, message = DAMAGES[damage]
    save_transformer(model, tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_transformer(tmp_path)


SHARD_DAMAGES = {
    "no map": (lambda i: i.pop("weight_map"), "is no index of shards"),
    "outside": (lambda i: i["weight_map"].update({NORM: "../x.safetensors"}), "beside the index"),
    "no shard": (lambda i: i["weight_map"].update({NORM: "x.safetensors"}), r"x\.safetensors is m"),
    "misplaced": (
        lambda i: i["weight_map"].update({NORM: i["weight_map"]["lm_head.weight"]}),
        f"lacks {NORM}, which the index places there",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_what_is_wrong_with_shards_is_named(model, tmp_path, damage):
    change, message = SHARD_DAMAGES[damage]
    save_transformer(model, tmp_path, max_shard_bytes=1)
    edited(tmp_path, INDEX_FILE, change)
    with pytest.raises(ConfigError, match=message):
        load_transformer(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pth"])
def test_pickles_are_not_read(model, tmp_path, name):
    save_transformer(model, tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} is a pickle.* convert it with safetensors"):
        load_transformer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").unlink()
    save_file(torch.load(tmp_path / name, weights_only=True), tmp_path / "model.safetensors")
    assert_equal(model, load_transformer(tmp_path))


def test_shard_size_must_be_positive(model, tmp_path):
    with pytest.raises(ConfigError, match="max_shard_bytes must be positive, got 0"):
        save_transformer(model, tmp_path, max_shard_bytes=0)


def language_model(*, tied, dtype=torch.float32, **changes):
    """A Qwen3 language model as transformers makes it: 70 rows, of which 64 are ids."""
    values = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_window_layers": 2,
        "tie_word_embeddings": tied,
        "rope_theta": 5e4,
    }
    config = Qwen3Config(**(values | changes))
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = Qwen3ForCausalLM(config)
        for parameter in network.parameters():  # norms too, or they would not be tested
            torch.nn.init.normal_(parameter, mean=0.5 * (parameter.dim() == 1), std=0.3)
    return network.to(dtype).eval()


ARGUMENTS = {"codebook_size": 30, "lm_vocab_size": 64, "bov_token_id": 60}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_qwen3_goes_on_as_the_language_model_that_it_was(tmp_path, tied, shards):
    source = language_model(tied=tied)
    source.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    ours = init_from_qwen3(tmp_path, seed=0, **ARGUMENTS)
    assert ours.config.rope_theta == 5e4
    assert torch.equal(ours.model.embed_tokens.weight[:64], source.model.embed_tokens.weight[:64])
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = source.model(input_ids=ids, use_cache=False).last_hidden_state
        causal = block_causal_mask([1] * 12)
        hidden = ours.forward_ids(ids, torch.arange(12), attention_mask=causal)
        seeing_all = ours.forward_ids(ids, torch.arange(12))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(seeing_all, expected, atol=1e-2)


def test_qwen3_keeps_its_type_unless_told(tmp_path):
    source = language_model(tied=True, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        ours = init_from_qwen3(tmp_path, seed=0, dtype=dtype, **ARGUMENTS)
        assert {parameter.dtype for parameter in ours.parameters()} == {expected}
        rows = source.model.embed_tokens.weight[:64]
        assert torch.equal(ours.model.embed_tokens.weight[:64], rows.to(expected))
    save_transformer(ours, tmp_path / "ursa")
    assert_equal(ours, load_transformer(tmp_path / "ursa"))


def test_new_rows_look_like_text_rows_and_follow_the_codebook(tmp_path):
    """Width 512: statistics of the rows, and near codes start near."""
    source = language_model(tied=True, hidden_size=512)
    with torch.no_grad():  # columns of different mean and size
        source.model.embed_tokens.weight.mul_(torch.linspace(0.5, 2, 512)).add_(0.1)
    source.save_pretrained(tmp_path)
    arguments = ARGUMENTS | {"codebook_size": 200}
    generator = torch.Generator().manual_seed(0)
    codebook = torch.rand(200, 3, generator=generator) * 2 - 1
    codebook[1] = codebook[0] + 0.01
    text = source.model.embed_tokens.weight[:64]
    for codes in (None, codebook):
        ours = init_from_qwen3(tmp_path, codebook=codes, seed=3, **arguments)
        rows, head = ours.model.embed_tokens.weight[64:], ours.lm_head.weight
        assert rows.shape == head.shape == (200, 512)
        ratio = rows.std(0) / text.std(0)
        assert ratio.mean().item() == pytest.approx(1, abs=0.1)
        assert ((rows.mean(0) - text.mean(0)) / text.std(0)).abs().mean() < 0.1
        assert head.std().item() == pytest.approx(0.02, rel=0.1)
        again = init_from_qwen3(tmp_path, codebook=codes, seed=3, **arguments)
        assert_equal(ours, again)
        other = init_from_qwen3(tmp_path, codebook=codes, seed=4, **arguments)
        assert not torch.equal(other.lm_head.weight, head)
    near = torch.nn.functional.cosine_similarity(head[0], head[1], dim=0)
    assert near > 0.95
    far = (codebook[0] - codebook).square().sum(-1).argmax()
    assert torch.nn.functional.cosine_similarity(head[0], head[far], dim=0) < 0.5


def test_both_spellings_of_the_base_are_read(tmp_path):
    language_model(tied=True).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    plain = {k: v for k, v in values.items() if k not in {"rope_theta", "rope_parameters"}}
    parameters = {"rope_theta": 777.0, "rope_type": "default"}
    for spelling, theta in (
        ({"rope_theta": 555.0, "rope_scaling": None}, 555.0),
        ({"rope_parameters": parameters}, 777.0),
    ):
        (tmp_path / "config.json").write_text(json.dumps(plain | spelling))
        assert init_from_qwen3(tmp_path, seed=0, **ARGUMENTS).config.rope_theta == theta
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="names no rope_theta, neither at the top"):
        init_from_qwen3(tmp_path, seed=0, **ARGUMENTS)


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"model_type": "llama"}, {}, "model_type must be 'qwen3', got 'llama'"),
        ({"hidden_size": "wide"}, {}, "is no Qwen3 model: hidden_size"),
        ({"attention_bias": True}, {}, "has no attention_bias true"),
        ({"use_sliding_window": True}, {}, "has no use_sliding_window true"),
        ({"hidden_act": "gelu"}, {}, "has no hidden_act gelu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {}, "has no rope_type .*yarn"),
        ({}, {"lm_vocab_size": 71}, "vocab_size 70 is below lm_vocab_size 71"),
        ({}, {"bov_token_id": 64}, "bov_token_id 64 must be a text id below lm_vocab_size 64"),
        ({}, {"codebook": torch.zeros(29, 3)}, r"codebook must have shape \(30, D\)"),
        ({"intermediate_size": 40}, {}, r"mlp.\w+_proj.weight must be .*\b40\b"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(tmp_path, values, arguments, message):
    language_model(tied=True).save_pretrained(tmp_path)
    edited(tmp_path, "config.json", lambda config: config.update(values))
    with pytest.raises(ConfigError, match=message):
        init_from_qwen3(tmp_path, seed=0, **(ARGUMENTS | arguments))


def test_a_directory_without_language_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no Qwen3 model .* config\.json is missing"):
        init_from_qwen3(tmp_path, seed=0, **ARGUMENTS)
