"""Prepare the services of a deployment for runs; doing it again changes nothing.

Makes the buckets, the MLflow user of the pipeline, the work pool, the deployments of prefect.yaml
and the automations. Runs once after every start and upgrade (the service `bootstrap` of
compose/compose.yaml, the job of k8s/bootstrap.yaml). Everything comes from the environment:

PREFECT_API_URL, PREFECT_API_AUTH_STRING: the server, and `user:password` of its API.
URSA_POOL, URSA_SOURCE_URI, URSA_PRESET: work pool; source and preset of all deployments.
URSA_NOTIFICATION_BLOCK: `type/name` of the block that tells of failed runs; none, no message.
MLFLOW_TRACKING_URI, MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD: its administrator.
MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD: the user to make.
URSA_BUCKETS, AWS_*: buckets to make, separated by commas, and who may make them.
"""

import base64
import http.client
import json
import os
import string
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
AUTOMATIONS = ROOT / "infra" / "automations.yaml"
DEPLOYMENTS = ROOT / "prefect.yaml"
RETRAINING = "ursa/scheduled-retraining"
PREFECT = str(Path(sys.executable).parent / "prefect")


def say(text: str) -> None:
    """Write one line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def make_buckets(names: list[str]) -> None:
    """Create the buckets that are not there."""
    import boto3  # noqa: PLC0415  (of the extra `server`)
    from botocore.exceptions import ClientError  # noqa: PLC0415

    client = boto3.client("s3")
    for name in names:
        try:
            client.head_bucket(Bucket=name)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != http.client.NOT_FOUND:
                raise
            client.create_bucket(Bucket=name)
            say(f"bucket {name}: made")


def call_mlflow(method: str, path: str, body: dict[str, str]) -> None:
    """Send a request to MLflow as its administrator."""
    administrator = (
        f"{os.environ.get('MLFLOW_AUTH_ADMIN_USERNAME', 'admin')}:"
        f"{os.environ['MLFLOW_AUTH_ADMIN_PASSWORD']}"
    )
    request = urllib.request.Request(  # noqa: S310  (the operator's own address)
        f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api/2.0/mlflow/users/{path}",
        data=json.dumps(body).encode(),
        method=method,
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(administrator.encode()).decode()}",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        answer.read()


def make_mlflow_user(name: str, password: str) -> None:
    """Create a user who is no administrator, or give an existing one its present password."""
    user = {"username": name, "password": password}
    try:
        call_mlflow("POST", "create", user)
        say(f"MLflow user {name}: made")
    except urllib.error.HTTPError as error:
        if "RESOURCE_ALREADY_EXISTS" not in error.read().decode(errors="replace"):
            raise
        call_mlflow("PATCH", "update-password", user)


def deployments(source_uri: str | None, preset: str | None) -> dict[str, Any]:
    """Return prefect.yaml with another source and preset for all deployments."""
    content: dict[str, Any] = yaml.safe_load(DEPLOYMENTS.read_text())
    chosen = {"source_uri": source_uri, "preset": preset}
    for deployment in content["deployments"]:
        deployment["parameters"].update({k: v for k, v in chosen.items() if v})
        deployment["work_pool"]["name"] = os.environ.get("URSA_POOL", "ursa")
    return content


def deploy(content: dict[str, Any]) -> None:
    """Create the work pool and all deployments, with their triggers."""
    pool = os.environ.get("URSA_POOL", "ursa")
    keep_schedule(content, retraining())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        for command in (
            ("work-pool", "create", pool, "--type", "process", "--overwrite"),
            ("deploy", "--all", "--prefect-file", str(path)),
        ):
            subprocess.run([PREFECT, "--no-prompt", *command], cwd=ROOT, check=True)


def retraining() -> dict[str, Any] | None:
    """Return the deployment of the retraining as the server has it; None if it has none."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.exceptions import ObjectNotFound  # noqa: PLC0415

    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(RETRAINING).model_dump(mode="json")
        except ObjectNotFound:
            return None


def keep_schedule(content: dict[str, Any], live: dict[str, Any] | None) -> None:
    """Let what is deployed say of the schedule what somebody has switched: the file says off.

    As in `infra/local/services.py`, which is not in the image: nothing is put back afterwards, so a
    kill at any moment leaves the schedule as it was. The retraining itself gets what `ursa schedule
    on` has given its schedule, as before. The schedule of the file has a slug; what somebody has
    made in Prefect is a matter of its own.
    """
    known = {item["slug"]: item for item in live["schedules"] if item["slug"]} if live else {}
    name = RETRAINING.partition("/")[2]
    (own,) = (item for item in content["deployments"] if item["name"] == name)
    for item in own["schedules"]:
        if now := known.get(item["slug"]):
            item |= {"active": now["active"], "parameters": now["parameters"]}
            own["parameters"] = {**own["parameters"], **now["parameters"]}


def automations(block_id: str | None) -> list[dict[str, Any]]:
    """Return the automations; without a block those that need none."""
    template = string.Template(AUTOMATIONS.read_text())
    text = template.safe_substitute(NOTIFICATION_BLOCK_ID=block_id or "")
    found: list[dict[str, Any]] = yaml.safe_load(text)["automations"]
    if block_id:
        return found
    return [
        item
        for item in found
        if not any("block_document_id" in action for action in item["actions"])
    ]


def apply_automations(block: str | None) -> None:
    """Create the automations, replace those of the same names."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.events.schemas.automations import AutomationCore  # noqa: PLC0415
    from prefect.exceptions import ObjectNotFound  # noqa: PLC0415

    with get_client(sync_client=True) as client:
        block_id = None
        if block:
            kind, _, name = block.partition("/")
            try:
                block_id = str(client.read_block_document_by_name(name, kind).id)
            except ObjectNotFound as error:
                raise SystemExit(
                    f"Prefect has no block URSA_NOTIFICATION_BLOCK={block}, expected type/name "
                    "such as slack-webhook/alerts; make it on the page Blocks, or leave the "
                    "variable empty"
                ) from error
        for content in automations(block_id):
            automation = AutomationCore.model_validate(content)
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)
            say(f"automation {automation.name}: set")
    if not block:
        say("nobody is told of failed runs: URSA_NOTIFICATION_BLOCK is not set")


def main() -> int:
    """Do what the environment asks for."""
    if buckets := os.environ.get("URSA_BUCKETS"):
        make_buckets([name.strip() for name in buckets.split(",")])
    if os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD"):
        make_mlflow_user(
            os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
        )
    deploy(deployments(os.environ.get("URSA_SOURCE_URI"), os.environ.get("URSA_PRESET")))
    apply_automations(os.environ.get("URSA_NOTIFICATION_BLOCK"))
    say("ready for runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
