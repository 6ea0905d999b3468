"""Secrets are in no message, record or log of what goes wrong (S8); the whole run: tests/e2e."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.settings import RuntimeSettings
from ursa import storage
from ursa.cli import main
from ursa.cli.models import refuse_secrets
from ursa.errors import ConfigError, DataError, StorageError, UrsaError
from ursa.sources.listing import discover_videos
from ursa.sources.manifest import read_manifest

CANARY = "canary5f2b9d61c0"
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"),
    *("URSA_CAPTIONER_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "RAY_AUTH_TOKEN"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}{name}")


ADDRESSES = (
    f"https://me:{CANARY}@host.test/a.mp4",
    f"https://{CANARY}@host.test/a.mp4",
    f"https://host.test/a.mp4?X-Amz-Credential=x&X-Amz-Signature={CANARY}",
    f"https://host.test/a.mp4?token={CANARY}",
    f"s3://key:{CANARY}@bucket/a.mp4",
    f"http://me:{CANARY}@host.test/a.mp4",
    f"ftp://me:{CANARY}@host.test/a.mp4",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{address}\n")
    for refused in (
        lambda: read_manifest(str(tmp_path / "list.txt"), allow_https=True),
        lambda: discover_videos(address, allow_https=True),
    ):
        with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match="holds") as error:
            refused()
        assert CANARY not in str(error.value) + caplog.text


def test_a_tracking_address_with_a_password_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://me:{CANARY}@127.0.0.1:5000"
    monkeypatch.setenv("URSA_MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as error:
        RuntimeSettings.from_env()
    assert CANARY not in str(error.value)
    for variable, command in (
        ("MLFLOW_TRACKING_URI", ["models", "list"]),
        ("PREFECT_API_URL", ["schedule", "show"]),
    ):
        monkeypatch.setenv(variable, f"{address}/api")
        with pytest.raises(SystemExit):
            main(command)
        shown = capsys.readouterr()
        assert "holds a user name or password" in shown.err
        assert CANARY not in shown.err + shown.out


ROOT = f"s3://AKIAEXAMPLE:{CANARY}@bucket/x"


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["models", "history"],
        ["data", "versions"],
        ["data", "uses", "a.mp4"],
        ["data", "uses", "a.mp4", "--flag", "on request"],
        ["data", "verify"],
        ["data", "stats"],
        ["data", "repair"],
        ["evaluate", "."],
    ],
)
def test_a_data_root_with_a_password_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("URSA_DATA_URI", ROOT)
    assert refusal(capsys, command) == "the address of the data root holds a user name or password"


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Return what a command is refused with, which shows no secret."""
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert CANARY not in shown.err + shown.out
    assert "AKIA" not in shown.err + shown.out
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("error: ").partition(";")[0]


@pytest.mark.parametrize(
    "command",
    [
        ["data", "versions", ROOT],
        ["data", "uses", ROOT],
        ["data", "stats", f"--selection={ROOT}"],
        ["data", "card", "--out", ROOT],
        ["models", "history", "--root", ROOT],
        ["generate", "a tree", "--model", ROOT],
        ["generate", "a tree", "--model", ".", "--out", f"{ROOT}/a.mp4"],
        ["generate", "a tree", "--model", ".", "--image", f"https://h.test/a.png?token={CANARY}"],
        ["demo", "--model", ROOT],
        ["evaluate", ROOT],
        ["evaluate", ".", "--against", ROOT],
        ["merge", ROOT, "--model", ".", "--out", "merged"],
        ["benchmark", "draw", ROOT, "vbench", "--prompts", "a", "--out", "b"],
        ["benchmark", "read", ROOT, "vbench"],
        ["plan", "tiny", "--set", f"visual_tokenizer.directory_uri={ROOT}"],
        ["no-such-command", ROOT],
        ["schedule", "on", "--source", f"https:/h.test/x?token={CANARY}"],
    ],
)
def test_an_argument_with_a_password_is_refused(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert refusal(capsys, command).startswith("the address in argument ")


def test_texts_may_speak_of_addresses() -> None:
    refuse_secrets(["promote", "1", "--reason", "see git+ssh://git@github.com/a/b/issues/3"])
    refuse_secrets(["evaluate", "models:/ursa@champion", "models:/a:b@champion"])
    refuse_secrets(["generate", "a sign that says http://example.com/?code=A1B2C3D4E5F6G7H8"])
    refuse_secrets(["data", "stats", "s3://arn:aws:s3:us-east-1:1:accesspoint/x/a@b"])


@pytest.mark.parametrize("call", [storage.read_bytes, storage.list_files, storage.exists])
def test_the_store_does_not_repeat_a_password(call: Callable[[str], object]) -> None:
    with pytest.raises(StorageError, match="holds a user name or password") as error:
        call(ROOT)
    assert CANARY not in str(error.value)
    assert "AKIA" not in str(error.value)


def test_a_store_with_a_password_in_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "UNREACHABLE_BUDGET_S", 0.1)
    monkeypatch.setattr(storage, "BUSY_BUDGET_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{CANARY}@127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UrsaError) as error:
        storage.read_bytes("s3://bucket/key")
    assert CANARY not in str(error.value)


def test_settings_and_configuration_hold_no_secret() -> None:
    from ursa.config import load_config

    kept = [
        RuntimeSettings.from_env().model_dump_json(),
        *(load_config(preset).model_dump_json() for preset in ("tiny", "small")),
    ]
    assert not [text for text in kept if CANARY in text]


def test_the_process_that_decodes_gets_none_of_them(tmp_path: Path) -> None:
    from ursa.video.sandbox import child_command, child_environment

    script = tmp_path / "show.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    command = [*child_command("runpy")[:2], str(script)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert json.loads(done.stdout)["PYTHONPATH"]
    assert CANARY not in done.stdout
    assert sys.executable == command[0]
    assert CANARY in os.environ["AWS_SECRET_ACCESS_KEY"]
