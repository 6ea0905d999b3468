import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import media
from tests.unit.ursa.tokenizers import test_cosmos, test_ibq
from ursa.errors import ConfigError
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.visual import load_visual_tokenizer, save_visual_tokenizer

OFFICIAL_FILE = "diffusion_pytorch_model.safetensors"
VIDEO = media.panning(5, step=3, height=32, width=48)[None]


def fitted():
    config = FittedConfig(levels=(5, 4, 3), hidden_channels=8, num_residual_blocks=1)
    return FittedAutoencoder(config)


NETWORKS = {"cosmos": test_cosmos.build, "image": test_ibq.build, "fitted": fitted}


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", NETWORKS)
def test_save_and_load_is_exact(name, tmp_path):
    network = NETWORKS[name]()
    save_visual_tokenizer(network, tmp_path / "a")
    again = load_visual_tokenizer(tmp_path / "a").network
    assert type(again) is type(network)
    assert again.config == network.config
    save_visual_tokenizer(again, tmp_path / "b")
    config = tmp_path / "a" / "config.json"
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.stat().st_mode == config.stat().st_mode  # whoever may read one may read all


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_stay_as_they_are(dtype, tmp_path):
    network = test_cosmos.build().to(dtype)
    save_visual_tokenizer(network, tmp_path)
    tokenizer = load_visual_tokenizer(tmp_path)
    assert tokenizer.dtype == dtype
    tokenizer.to(dtype=torch.float32).to(dtype=dtype)
    for name, value in network.state_dict().items():
        assert torch.equal(tokenizer.network.state_dict()[name], value)


def test_saving_over_another_network_leaves_nothing_of_it(tmp_path):
    for build in (test_cosmos.build, fitted, test_cosmos.build):
        save_visual_tokenizer(build(), tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        load_visual_tokenizer(tmp_path)


def test_official_names_and_fields(tmp_path):
    save_visual_tokenizer(test_cosmos.build(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", OFFICIAL_FILE]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderVQCosmos3D"
    assert config["_quantizer_name"] == "FSQuantizer"
    assert "_diffusers_version" in config
    assert "causal_attention" not in config


def test_causal_attention_is_kept(tmp_path):
    save_visual_tokenizer(test_cosmos.build(causal_attention=True), tmp_path)
    assert load_visual_tokenizer(tmp_path).network.config.causal_attention


def test_the_former_name_of_the_fitted_network_is_read(tmp_path):
    network = fitted()
    save_visual_tokenizer(network, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_class_name"] == "FittedAutoencoder"
    change_config(tmp_path, _class_name="CosmosAutoencoder")
    assert load_visual_tokenizer(tmp_path).network.config == network.config


def test_left_out_fields_have_the_official_defaults(tmp_path):
    save_visual_tokenizer(test_cosmos.build(), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    shape = {key: values[key] for key in test_cosmos.SMALL}
    path.write_text(json.dumps({"_class_name": "AutoencoderVQCosmos3D", **shape}))
    assert load_visual_tokenizer(tmp_path).network.config.sample_frames == 17


def test_where_a_file_came_from_is_not_part_of_the_network(tmp_path):
    save_visual_tokenizer(test_ibq.build(), tmp_path)
    change_config(tmp_path, _name_or_path="somewhere/else", _use_default_values=["act_fn"])
    assert load_visual_tokenizer(tmp_path).network.config == test_ibq.build().config


def shard(directory):
    path = directory / OFFICIAL_FILE
    weights = load_file(path)
    path.unlink()
    keys = sorted(weights)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, directory / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (directory / f"{OFFICIAL_FILE}.index.json").write_text(json.dumps(index))
    return index


def test_sharded_weights(tmp_path):
    network = test_ibq.build()
    save_visual_tokenizer(network, tmp_path)
    index = shard(tmp_path)
    loaded = load_visual_tokenizer(tmp_path).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors cannot be read"):
        load_visual_tokenizer(tmp_path)
    index["weight_map"]["x"] = "../outside.safetensors"
    (tmp_path / f"{OFFICIAL_FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="file names beside it"):
        load_visual_tokenizer(tmp_path)


def test_weights_of_another_network_are_named(tmp_path):
    save_visual_tokenizer(test_ibq.build(), tmp_path)
    path = tmp_path / OFFICIAL_FILE
    weights = load_file(path)
    weights["quantizer.other"] = weights.pop("quantizer.embedding.weight")
    weights["quant_conv.bias"] = torch.zeros(7)
    weights["post_quant_conv.bias"] = torch.zeros(8, dtype=torch.int64)
    save_file(weights, path)
    with pytest.raises(ConfigError) as caught:
        load_visual_tokenizer(tmp_path)
    message = str(caught.value)
    assert "missing quantizer.embedding.weight" in message
    assert "unexpected quantizer.other" in message
    assert "of another shape quant_conv.bias (7,) instead of (6,)" in message
    assert "not floating post_quant_conv.bias" in message


def test_more_missing_keys_than_can_be_named_are_counted(tmp_path):
    network = test_ibq.build()
    save_visual_tokenizer(network, tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / OFFICIAL_FILE)
    with pytest.raises(ConfigError, match=f"and {len(network.state_dict()) - 3} more"):
        load_visual_tokenizer(tmp_path)


def test_directories_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_visual_tokenizer(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"_class_name": "Other"}', "or 'AutoencoderVQ', got 'Other'"),
        ("{}", "got None"),
        ('{"_class_name": "AutoencoderVQ", "heads": 3}', "heads"),
        ('{"_class_name": "AutoencoderVQ", "decoder_dtype": "int8"}', "decoder_dtype"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_visual_tokenizer(tmp_path)
    save_visual_tokenizer(test_ibq.build(), tmp_path)
    (tmp_path / OFFICIAL_FILE).write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_visual_tokenizer(tmp_path)
    (tmp_path / OFFICIAL_FILE).unlink()
    with pytest.raises(ConfigError, match="holds no weights: expected diffusion_pytorch_model"):
        load_visual_tokenizer(tmp_path)
