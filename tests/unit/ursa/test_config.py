import hashlib
import json
import re
from importlib import resources

import pytest
import yaml
from pydantic import ValidationError

from tests import factories
from ursa.artifacts import StageRequest
from ursa.config import (
    PRESETS,
    STAGES,
    ConfigOverrides,
    IngestionConfig,
    RunConfig,
    fingerprint,
    load_config,
    parse_config,
)
from ursa.errors import ConfigError
from ursa.training.stage import train_stage


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_complete(preset):
    config = load_config(preset)
    assert isinstance(config, RunConfig)
    assert parse_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset, tiny_data, tmp_path):
    small = {
        "text_tokenizer": {"max_prompt_length": 4},
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1},
        "path": {"schedule": "fixed"},
        "evaluation": {"max_samples": 2},
    }
    stages = {name: {"max_steps": 2, "global_batch_size": 2} for name in STAGES}
    config = load_config(preset, {**small, "stages": stages})
    for stage in STAGES:
        request = StageRequest(
            stage=stage,
            config=config,
            datasets=tiny_data.datasets,
            visual_tokenizer=tiny_data.visual_tokenizer,
            text_tokenizer=tiny_data.text_tokenizer,
            init_from=None,
            output_uri=str(tmp_path),
        )
        assert train_stage(request).step == 2


def test_unknown_preset_names_the_known():
    with pytest.raises(ConfigError, match=r"one of tiny, small, got 'huge'"):
        load_config("huge")


def test_unknown_key_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"stages\.video_pretrain\.max_stepz"):
        load_config("tiny", {"stages": {"video_pretrain": {"max_stepz": 3}}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"stages": {"video_pretrian": {"max_steps": 3}}},
            "stages.video_pretrian: unknown key; did you mean 'video_pretrain'?",
        ),
        (
            {"stages": {"video_pretrain": {"max_stepz": 3}}},
            "stages.video_pretrain.max_stepz: unknown key; did you mean 'max_steps'?",
        ),
        ({"sead": 1}, "sead: unknown key; did you mean 'seed'?"),
        (
            {"path": {"zzz": 1}},
            "path.zzz: unknown key; it takes schedule, max_deviation, distance, weights, metric, "
            "alpha, c",
        ),
    ],
)
def test_mistyped_key_names_the_nearest(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("tiny", overrides)
    with pytest.raises(ValidationError) as refused:
        ConfigOverrides.model_validate(overrides)
    (item,) = refused.value.errors()
    assert f"{'.'.join(item['loc'])}: {item['msg']}" == message


def test_every_bad_key_is_in_one_message():
    with pytest.raises(ConfigError) as error:
        load_config(
            "tiny",
            {"seed": -1, "model": {"head_dim": 24}, "nonsense": 1, "path": {"schedule": "{x}"}},
        )
    for part in ("seed", "model.head_dim", "nonsense", "'24'", "path.schedule", "'{x}'"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokenization": {"num_frames": 6}}, r"1 \+ 4k, got 6"),
        ({"tokenization": {"height_px": 20}}, "height_px must be divisible by 8, got 20"),
        ({"tokenization": {"fps": 99}}, r"99.0 must not exceed"),
        ({"ingestion": {"min_clip_s": 99}}, "min_clip_s 99.0 must not exceed"),
        ({"model": {"num_key_value_heads": 3}}, "must be a multiple of"),
        ({"stages": {"image_pretrain": {"timesteps": "per_frame"}}}, "needs modality 'video'"),
        ({"release": {"model_name": "a/b"}}, "release.model_name"),
        ({"stages": 3}, "stages"),
        ({"seed": None}, "seed"),
    ],
)
def test_values_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", overrides)


def test_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config("tiny").seed = 2


def test_codebook_size_is_the_product_of_the_levels():
    assert factories.tiny_config().visual_tokenizer.codebook_size == 60


def test_overrides_may_leave_out_anything_but_add_nothing():
    ConfigOverrides.model_validate({"stages": {"video_pretrain": {"max_steps": 3}}})
    with pytest.raises(ValidationError, match="max_stepz"):
        ConfigOverrides.model_validate({"stages": {"video_pretrain": {"max_stepz": 3}}})


def test_records_that_lack_newer_limits_are_read_and_presets_name_them():
    values = load_config("tiny").ingestion.model_dump()
    newer = {name: values.pop(name) for name in ("pixel_budget_per_s", "child_cpu_s")}
    IngestionConfig.model_validate(values)
    for preset in PRESETS:
        text = resources.files("ursa.presets").joinpath(f"{preset}.yaml").read_text("utf-8")
        assert yaml.safe_load(text)["ingestion"].keys() == IngestionConfig.model_fields.keys()
    assert newer == {"pixel_budget_per_s": 500_000_000, "child_cpu_s": 6}


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 3000])
def test_a_fingerprint_is_that_of_the_whole_text(count):
    """Names of all that was ever made depend on it."""
    config = load_config("tiny").selection
    items = [{"b": index, "a": [None, "\u00e9"]} for index in range(count)]
    plain = ["x", items, 2.5, config.model_dump(mode="json"), {"k": items}]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint("x", tuple(items), 2.5, config, {"k": items}) == expected
    plain[1] = [config.model_dump(mode="json")] * count
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint("x", [config] * count, 2.5, config, {"k": items}) == expected


def test_a_fingerprint_of_nothing():
    assert fingerprint() == hashlib.sha256(b"[]").hexdigest()
