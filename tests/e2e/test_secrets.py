"""Whole and failing runs with a canary in the place of every secret: nothing left holds one.

Looked through: what is printed, logs, the databases of Prefect and MLflow, MLflow's artifacts, the
data root in the bucket with the texts of its tables, command lines of what is running (S8).
"""

import io
import secrets
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import running_services
from tests.e2e.test_s3 import Bucket
from tests.running_services import ROOT, TINY, Running, changed, free_port, run_arguments, versions
from tests.s3_server import running_s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAMES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"),
    # the user name beside it is no secret: MLflow writes down who has made a run
    *("URSA_CAPTIONER_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("PREFECT_API_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY", "RAY_AUTH_TOKEN"),
)
IN_ADDRESSES = ("user", "password", "signature", "token", "endpoint", "tracking")


class Runs(NamedTuple):
    """What has been run, and what it must not have left."""

    services: Running
    bucket: Bucket
    canaries: dict[str, str]
    outputs: dict[str, str]


@pytest.fixture(scope="module")
def canaries() -> dict[str, str]:
    return {name: f"canary{secrets.token_hex(12)}" for name in (*NAMES, *IN_ADDRESSES)}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with running_s3_server("ursa") as address:
        yield Bucket(address)


@pytest.fixture(scope="module")
def runs(
    canaries: dict[str, str], bucket: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    folder, source = tmp_path_factory.mktemp("services"), tmp_path_factory.mktemp("videos")
    for name in ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4"):
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, source)
    (source / "broken.mp4").write_bytes(b"no video\n" * 100)
    signed = tmp_path_factory.mktemp("signed")
    for kind, address in {
        "user": "https://{user}:{password}@host.test/a.mp4",
        "query": "https://host.test/a.mp4?X-Amz-Signature={signature}&token={token}",
    }.items():
        (signed / f"{kind}.txt").write_text(address.format(**canaries) + "\n")
    environment = {
        **running_services.service_environment(folder),
        **{name: canaries[name] for name in NAMES},
        "MLFLOW_TRACKING_USERNAME": "someone",
        "AWS_ENDPOINT_URL": bucket.address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "URSA_DATA_URI": "s3://ursa/data",
    }
    outputs: dict[str, str] = {}

    def script(name: str, *arguments: str, **variables: str) -> int:
        done = running_services.run_script(
            *arguments, environment={**environment, **variables}, limit_s=900
        )
        outputs[name] = done.stdout + done.stderr
        return done.returncode

    overrides = changed({"release": {"model_name": "secrets"}}, TINY)
    https = changed({"ingestion": {"allow_https": True}}, overrides)
    endpoint = f"http://{canaries['endpoint']}:{canaries['endpoint']}@127.0.0.1:{free_port()}"
    tracking = f"http://someone:{canaries['tracking']}@127.0.0.1:{environment['URSA_MLFLOW_PORT']}"
    try:
        assert script("up", "up") == 0, outputs
        assert script("whole", *run_arguments(source, overrides)) == 0, outputs["whole"][-5000:]
        for kind in ("user", "query"):
            assert script(kind, *run_arguments(signed / f"{kind}.txt", https)) == 1
        other = changed({"release": {"model_name": "other"}}, overrides)
        assert script("endpoint", *run_arguments(source, other), AWS_ENDPOINT_URL=endpoint) == 1
        assert script("tracking", *run_arguments(source, other), URSA_MLFLOW_TRACKING_URI=tracking)
        yield Runs(
            running_services.at(folder, environment),
            bucket,
            canaries,
            outputs,
        )
    finally:
        script("down", "down")


def texts_of(data: bytes) -> bytes:
    """Return the texts of a table, which are compressed in its file."""
    table = pq.read_table(io.BytesIO(data))
    columns = [column for column in table.columns if pa.types.is_string(column.type)]
    said = [str(column.to_pylist()) for column in columns]
    return "\n".join([*said, str(table.schema.metadata)]).encode()


def test_errors_say_what_is_wrong(runs: Runs) -> None:
    assert "registered secrets version 1" in runs.outputs["whole"]
    assert "host.test holds a user name or password" in runs.outputs["user"]
    assert "host.test holds X-Amz-Signature=..." in runs.outputs["query"]
    assert "FAILED: " in runs.outputs["endpoint"]
    assert "FAILED: " in runs.outputs["tracking"]


def test_no_secret_is_left_anywhere(runs: Runs) -> None:
    found: list[tuple[str, str]] = []
    num_places = 0

    def search(place: str, data: bytes) -> None:
        nonlocal num_places
        num_places += 1
        found.extend(
            (place, name) for name, value in runs.canaries.items() if value.encode() in data
        )

    for name, text in runs.outputs.items():
        search(f"output of {name}", text.encode())
    for path in runs.services.folder.rglob("*"):
        if path.is_file():
            search(str(path), path.read_bytes())
    for key in runs.bucket.objects():
        data = runs.bucket.client.get_object(Bucket="ursa", Key=key)["Body"].read()
        search(key, key.encode() + data)
        if key.endswith(".parquet"):
            search(f"texts of {key}", texts_of(data))
    commands = [" ".join(item.info["cmdline"] or ()) for item in psutil.process_iter(["cmdline"])]
    search("command lines", "\n".join(commands).encode())
    assert num_places > 150
    assert found == []
    # what was searched is what the run has made
    assert len(versions(runs.services, "secrets")) == 1
    databases = [path.name for path in runs.services.folder.rglob("*.db")]
    assert len(databases) >= 2, databases
