from pathlib import Path

import pytest

from tasks.settings import RuntimeSettings
from ursa.errors import ConfigError
from ursa.training.execution import Execution


def test_defaults_are_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URSA_DATA_URI", "URSA_LAUNCHER", "URSA_RAY_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    settings = RuntimeSettings.from_env()
    assert settings.data_uri == str(tmp_path / ".ursa" / "data")
    assert settings.ray_address is None
    assert settings.launcher == "ray"
    assert settings.uri("tokens", "a") == f"{tmp_path}/.ursa/data/tokens/a"


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URSA_DATA_URI", "s3://bucket/prefix")
    monkeypatch.setenv("URSA_NUM_WORKERS", "7")
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    settings = RuntimeSettings.from_env()
    assert settings.data_uri == "s3://bucket/prefix"
    assert settings.num_workers == 7
    assert settings.ray_address == "ray-head:6379"


def test_bad_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URSA_NUM_TRAIN_WORKERS", "0")
    with pytest.raises(ConfigError, match=r"URSA_NUM_TRAIN_WORKERS.*'0'"):
        RuntimeSettings.from_env()


def test_how_training_is_computed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RuntimeSettings.from_env().execution == Execution()
    monkeypatch.setenv("URSA_TRAIN_STRATEGY", "fsdp")
    monkeypatch.setenv("URSA_ACTIVATION_CHECKPOINTING", "mlp")
    monkeypatch.setenv("URSA_COMPILE_LAYERS", "1")
    assert RuntimeSettings.from_env().execution == Execution(
        strategy="fsdp", activation_checkpointing="mlp", compile_layers=True
    )
    monkeypatch.setenv("URSA_TRAIN_STRATEGY", "zero")
    with pytest.raises(ConfigError, match=r"URSA_TRAIN_STRATEGY.*'replicated' or 'fsdp'.*'zero'"):
        RuntimeSettings.from_env()
