"""One set of real services for all tests of a session: Prefect, MLflow and a worker."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "infra" / "local" / "services.py"
STAGES = ("image-pretrain", "video-pretrain", "async-finetune")
TINY: dict[str, Any] = {
    "visual_tokenizer": {
        "max_steps": 2,
        "hidden_channels": 8,
        "num_residual_blocks": 0,
        "max_windows": 16,
        "batch_size": 2,
    },
    "tokenization": {
        "num_frames": 5,
        "height_px": 32,
        "width_px": 48,
        "window_stride_s": 1.0,
        "image_stride_s": 1.0,
        "image_variants": 1,
        "video_variants": 0,
    },
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "stages": {
        name: {
            "max_steps": 4,
            "global_batch_size": 4,
            "warmup_steps": 1,
            "checkpoint_every": 2,
            "validate_every": 2,
            "log_every": 1,
            "sample_every": 2,
        }
        for name in ("image_pretrain", "video_pretrain", "async_finetune")
    },
    "evaluation": {
        "timesteps": [0.3, 0.7],
        "max_samples": 4,
        "batch_size": 4,
        "sampling": {"num_inference_steps": 2, "num_prompts": 1},
        "clips": {
            "num_prompts": 1,
            "seeds_per_prompt": 2,
            "num_windows": 2,
            "max_train_windows": 8,
            "asked_motion": [2.0, 32.0],
            "fewer_steps": [1],
        },
    },
}
"""Overrides that make a whole run a matter of seconds."""


class Running(NamedTuple):
    """Services that are up."""

    folder: Path
    environment: dict[str, str]
    prefect_url: str
    mlflow_url: str

    def script(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the services script against these services."""
        return run_script(*arguments, environment={**self.environment, **variables})

    def ask(self, url: str, body: Any = None, method: str | None = None) -> Any:
        """Send a GET, a POST or what else is named, and return the decoded answer."""
        return ask(url, body, method)

    def flow_run(self, output: str) -> dict[str, Any]:
        """Return the flow run whose id is in the output of `prefect deployment run`."""
        run_id = output.split("UUID: ")[1].split()[0]
        return dict(ask(f"{self.prefect_url}/api/flow_runs/{run_id}"))

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Return the newest artifacts by key."""
        found = ask(f"{self.prefect_url}/api/artifacts/latest/filter", {"limit": 200})
        return {item["key"]: item for item in found if item["key"]}


BUSY = 503
"""What Prefect answers while its database is locked, with nothing done; its client repeats it."""


def ask(url: str, body: Any = None, method: str | None = None) -> Any:
    """Send a request, again for some seconds while the service says that it is busy."""
    for pause_s in (0.5, 1.0, 2.0, 4.0):
        try:
            return ask_once(url, body, method)
        except urllib.error.HTTPError as error:
            if error.code != BUSY:
                raise
        time.sleep(pause_s)
    return ask_once(url, body, method)


def ask_once(url: str, body: Any = None, method: str | None = None) -> Any:
    call = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(call, timeout=20) as answer:
        return json.loads(answer.read() or "null")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def service_environment(folder: Path) -> dict[str, str]:
    own = ("URSA_", "PREFECT_", "MLFLOW_", "RAY_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {
        **inherited,
        "URSA_STATE_DIR": str(folder),
        "URSA_PREFECT_PORT": str(free_port()),
        "URSA_MLFLOW_PORT": str(free_port()),
        "URSA_LAUNCHER": "local",
    }


def run_script(
    *arguments: str, environment: dict[str, str], limit_s: float = 280
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@functools.cache
def start() -> Running:
    """Start the services once a session; they are stopped when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="ursa-services-"))
    environment = service_environment(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(run_script, "down", environment=environment)
    done = run_script("up", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return at(folder, environment)


def at(folder: Path, environment: dict[str, str]) -> Running:
    """Return the services of a folder that were brought up in this environment."""
    prefect, mlflow = environment["URSA_PREFECT_PORT"], environment["URSA_MLFLOW_PORT"]
    return Running(folder, environment, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}")


class Finished(NamedTuple):
    services: Running
    source: Path
    output: str
    flow_run: dict[str, Any]

    def run_again(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return run_pipeline(self.services, self.source, **variables)


def run_pipeline(
    services: Running, source: Path | str, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return services.script(*run_arguments(source, TINY, *more), **variables)


def run_arguments(source: Path | str, overrides: dict[str, Any], *more: str) -> tuple[str, ...]:
    """Return the arguments of the script that run the pipeline."""
    parameters = " ".join([f"--param overrides={json.dumps(overrides)}", *more])
    return ("run", "--source", str(source), f"--parameters={parameters}")


def changed(changes: dict[str, Any], values: dict[str, Any] = TINY) -> dict[str, Any]:
    """Return overrides with some values replaced."""
    result = {**values}
    for key, value in changes.items():
        result[key] = changed(value, values.get(key, {})) if isinstance(value, dict) else value
    return result


def versions(services: Running, model_name: str) -> list[dict[str, Any]]:
    """Return the registered versions of a model."""
    query = urllib.parse.urlencode({"filter": f"name = '{model_name}'"})
    url = f"{services.mlflow_url}/api/2.0/mlflow/model-versions/search?{query}"
    return list(services.ask(url).get("model_versions", []))


def metric_history(services: Running, run_id: str, key: str) -> list[dict[str, Any]]:
    """Return all points of a curve, in the order of their steps."""
    query = urllib.parse.urlencode({"metric_key": key, "run_id": run_id})
    url = f"{services.mlflow_url}/api/2.0/mlflow/metrics/get-history?{query}"
    found = services.ask(url).get("metrics", [])
    return sorted(found, key=lambda item: int(item.get("step", 0)))


def mlflow_runs(services: Running, query: str) -> list[dict[str, Any]]:
    found = services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/runs/search",
        {"experiment_ids": ["1"], "filter": query},
    )
    return list(found.get("runs", []))


def committed(services: Running) -> dict[Path, int]:
    """Return everything that steps have written, with the time of writing."""
    steps = ("clips", "selections", "tokenizers", "tokens", "checkpoints", "models", "evaluations")
    return {
        path: path.stat().st_mtime_ns
        for step in steps
        for path in (services.folder / "data" / step).rglob("*")
        if path.is_file()
    }


def tags(item: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in item["data"]["tags"]}
