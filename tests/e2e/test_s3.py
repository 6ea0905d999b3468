"""The whole run with source and data in a bucket of a real S3 server process on loopback."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests import running_services
from tests.running_services import (
    ROOT,
    TINY,
    Running,
    changed,
    run_arguments,
    versions,
)
from tests.s3_server import running_s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VIDEOS = ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4", "captions.jsonl")
NAME = "s3"


class Bucket:
    """A bucket of a server process."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="ursa", Key=key, Body=data)

    def objects(self) -> dict[str, str]:
        """Return the etag of every object by its key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="ursa")
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with running_s3_server("ursa") as address:
        found = Bucket(address)
        for name in VIDEOS:
            found.put(f"videos/{name}", (ROOT / "tests" / "data" / "videos" / name).read_bytes())
        found.put("videos/deep er/not a video.mp4", b"no video\n" * 100)
        yield found


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


def run(services: Running, bucket: Bucket, home: Path) -> subprocess.CompletedProcess[str]:
    """Run with nothing but variables of the environment that lead to the store."""
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": bucket.address,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
        "AWS_CONFIG_FILE": str(home / "none"),
        "URSA_DATA_URI": "s3://ursa/data",
        "URSA_LAUNCHER": "ray",
    }
    overrides = changed({"release": {"model_name": NAME}}, TINY)
    inherited = {k: v for k, v in services.environment.items() if not k.startswith("AWS_")}
    return running_services.run_script(
        *run_arguments("s3://ursa/videos", overrides),
        environment={**inherited, **variables},
        limit_s=900,
    )


def test_whole_run_on_s3(services: Running, bucket: Bucket, tmp_path: Path) -> None:
    local = services.folder / "data"
    before = sorted(local.rglob("*")) if local.exists() else []
    done = run(services, bucket, tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    state = services.flow_run(done.stdout)["state"]
    assert f"registered {NAME} version 1" in state["message"]
    (version,) = versions(services, NAME)
    lineage = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert lineage["ursa.source_uri"] == "s3://ursa/videos"
    assert lineage["ursa.tokens"].startswith("s3://ursa/data/tokens/")
    funnel = services.artifacts()["data-funnel"]["data"]
    # a backslash keeps Markdown from making a link of it
    assert "s3://ursa/videos/deep er/not a video.mp4" in funnel.replace("\\", "")
    # nothing but the bucket holds data
    assert (sorted(local.rglob("*")) if local.exists() else []) == before
    objects = bucket.objects()
    steps = {key.split("/")[1] for key in objects if key.startswith("data/")}
    assert steps >= {
        *("clips", "selections", "tokenizers", "tokens", "checkpoints", "models", "evaluations"),
    }
    assert not [key for key in objects if ".probe" in key or key.endswith(".tmp")]

    began = time.monotonic()
    again = run(services, bucket, tmp_path)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr
    assert "nothing changed: version 1 is up to date" in again.stdout
    assert time.monotonic() - began < 60
    assert bucket.objects() == objects
    assert len(versions(services, NAME)) == 1
