"""What compose.yaml and the image may not do: open ports, root, default passwords, loose images."""

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compose_stack import COMPOSE, ROOT, load_compose

PINNED = re.compile(r"^[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}$")
SECRET = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|AUTH_STRING|_KEY)$")
DOORS = {
    # what is published, and what must be true for it: secrets that it is given, words it is
    # started with, variables
    "prefect-server": (
        {"PREFECT_SERVER_API_AUTH_STRING"},
        set(),
        {"PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true"},
    ),
    "mlflow": (
        {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"},
        {"--app-name=basic-auth"},
        {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    ),
    "ray-head": ({"RAY_AUTH_TOKEN"}, set(), {"RAY_AUTH_MODE": "token"}),
    "s3": ({"s3.json"}, {"-s3.config=/run/secrets/s3.json", "-ip.bind=127.0.0.1"}, {}),
}


def targets(service: dict[str, Any]) -> set[str]:
    return {
        item if isinstance(item, str) else item["target"] for item in service.get("secrets", [])
    }


def words(service: dict[str, Any]) -> list[str]:
    return [str(item) for item in service.get("command", [])]


def exposure(compose: dict[str, Any]) -> list[str]:
    """Name what lets somebody in who should not."""
    found = []
    published = {name for name, item in compose["services"].items() if item.get("ports")}
    if published != set(DOORS):
        found.append(f"published: {published}")
    for name, service in compose["services"].items():
        found += [
            f"{name} publishes {port}"
            for port in service.get("ports", [])
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port))
        ]
        if service.get("network_mode", "none") != "none":
            found.append(f"{name} uses the network {service['network_mode']}")
        if name not in published and "edge" in service.get("networks", []):
            found.append(f"{name} reaches the outside")
    for name, (secrets, flags, variables) in DOORS.items():
        service = compose["services"][name]
        environment = service.get("environment", {})
        if missing := secrets - targets(service):
            found.append(f"{name} is not given {missing}")
        if missing := flags - set(words(service)):
            found.append(f"{name} is started without {missing}")
        found += [
            f"{name}: {key}={environment.get(key)}"
            for key, value in variables.items()
            if environment.get(key) != value
        ]
    mlflow = dict(item.partition("=")[::2] for item in words(compose["services"]["mlflow"]))
    origins = [
        mlflow.get("--allowed-hosts", "*"),
        mlflow.get("--cors-allowed-origins", "*"),
        compose["services"]["prefect-server"]["environment"].get(
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "*"
        ),
    ]
    found += [f"allowed: {item}" for item in origins if "*" in item]
    for name in ("ray-worker", "prefect-worker"):
        service = compose["services"][name]
        if service["environment"].get("RAY_AUTH_MODE") != "token":
            found.append(f"{name}: Ray without a token")
    found += [
        f"network {name} is open"
        for name, network in compose["networks"].items()
        if name != "edge" and not network.get("internal")
    ]
    return found


def looseness(compose: dict[str, Any]) -> list[str]:
    """Name containers that could do more than their work, and images that could become others."""
    found = []
    for name, service in compose["services"].items():
        if "build" not in service and not PINNED.match(service["image"]):
            found.append(f"{name}: image {service['image']}")
        if service.get("read_only") is not True:
            found.append(f"{name}: root file system can be written")
        if service.get("cap_drop") != ["ALL"]:
            found.append(f"{name}: keeps capabilities")
        if "no-new-privileges:true" not in service.get("security_opt", []):
            found.append(f"{name}: may gain privileges")
        if {"privileged", "pid", "ipc"} & set(service):
            found.append(f"{name}: sees the host")
        if any("docker.sock" in str(item) for item in service.get("volumes", [])):
            found.append(f"{name}: has Docker's socket")
        if name not in {"bootstrap", "s3-volume"} and not service.get("healthcheck"):
            found.append(f"{name}: nobody knows whether it is well")
        found += rootness(name, service)
    return found


def rootness(name: str, service: dict[str, Any]) -> list[str]:
    """Name a container that is root; one may be, that gives a volume to its user."""
    added = service.get("cap_add", [])
    if str(service.get("user", "0")).split(":")[0] not in {"0", "root"}:
        return [f"{name}: capabilities {added}"] if added else []
    alone = service.get("network_mode") == "none" and not targets(service)
    return [] if name == "s3-volume" and alone and added == ["CHOWN"] else [f"{name}: is root"]


def loose_secrets(compose: dict[str, Any]) -> list[str]:
    """Name secrets that stand in the file, or that are given to nobody."""
    found = []
    for name, service in compose["services"].items():
        environment = {key: str(value) for key, value in service.get("environment", {}).items()}
        found += [f"{name}: {key}" for key in environment if SECRET.search(key)]
        found += [
            f"{name}: a password in {text}"
            for text in [*words(service), *environment.values()]
            if re.search(r"://[^/\s:]+:[^/\s@]+@", text)
        ]
    used = {
        item if isinstance(item, str) else item["source"]
        for service in compose["services"].values()
        for item in service.get("secrets", [])
    }
    found += [f"unknown or unused: {name}" for name in used ^ set(compose["secrets"])]
    found += [
        f"{name}: {item}"
        for name, item in compose["secrets"].items()
        if item != {"file": f"./secrets/{name}"}
    ]
    return found


def test_nobody_comes_in_without_a_password() -> None:
    assert exposure(load_compose()) == []


def test_containers_can_do_their_work_and_no_more() -> None:
    assert looseness(load_compose()) == []


def test_no_secret_stands_in_the_file() -> None:
    assert loose_secrets(load_compose()) == []


def change(service: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda compose: compose["services"][service].update(values)


def set_variable(service: str, key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda compose: compose["services"][service]["environment"].update({key: value})


def without_word(service: str, start: str) -> Callable[[dict[str, Any]], None]:
    def drop(compose: dict[str, Any]) -> None:
        command = compose["services"][service]["command"]
        compose["services"][service]["command"] = [i for i in command if not i.startswith(start)]

    return drop


def without_secret(service: str, target: str) -> Callable[[dict[str, Any]], None]:
    def drop(compose: dict[str, Any]) -> None:
        secrets = compose["services"][service]["secrets"]
        kept = [i for i in secrets if target not in (i if isinstance(i, str) else i["target"])]
        compose["services"][service]["secrets"] = kept

    return drop


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        (exposure, change("prefect-server", ports=["4200:4200"])),
        (exposure, change("ray-head", ports=["0.0.0.0:8265:8265"])),
        (exposure, change("postgres", ports=["127.0.0.1:5432:5432"])),
        (exposure, change("ray-worker", network_mode="host")),
        (exposure, change("ray-worker", networks=["storage", "edge"])),
        (exposure, set_variable("ray-head", "RAY_AUTH_MODE", "disabled")),
        (exposure, set_variable("ray-worker", "RAY_AUTH_MODE", "disabled")),
        (
            exposure,
            set_variable("prefect-server", "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED", "false"),
        ),
        (
            exposure,
            set_variable("prefect-server", "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "*"),
        ),
        (exposure, without_secret("prefect-server", "AUTH_STRING")),
        (exposure, without_secret("ray-head", "RAY_AUTH_TOKEN")),
        (exposure, without_word("mlflow", "--app-name")),
        (exposure, without_word("mlflow", "--allowed-hosts")),
        (exposure, without_word("s3", "-s3.config")),
        (exposure, without_word("s3", "-ip.bind")),
        (exposure, lambda compose: compose["networks"].update(database={})),
        (looseness, change("postgres", image="postgres:18.6-trixie")),
        (looseness, change("s3", image="chrislusf/seaweedfs:latest")),
        (looseness, change("mlflow", user="0:0")),
        (looseness, change("s3-volume", network_mode="bridge")),
        (looseness, change("prefect-worker", read_only=False)),
        (looseness, change("ray-head", cap_drop=[])),
        (looseness, change("ray-head", cap_add=["SYS_ADMIN"])),
        (looseness, change("ray-head", security_opt=[])),
        (looseness, change("bootstrap", privileged=True)),
        (looseness, change("mlflow", healthcheck={})),
        (loose_secrets, set_variable("postgres", "POSTGRES_PASSWORD", "postgres")),
        (loose_secrets, set_variable("mlflow", "AWS_SECRET_ACCESS_KEY", "minio123")),
        (
            loose_secrets,
            set_variable("mlflow", "MLFLOW_BACKEND_STORE_URI", "postgresql://a:b@postgres/mlflow"),
        ),
        (loose_secrets, lambda compose: compose["secrets"].update(spare={"file": "x"})),
    ],
)
def test_planted_faults_are_found(
    check: Callable[[dict[str, Any]], list[str]], plant: Callable[[dict[str, Any]], None]
) -> None:
    compose = copy.deepcopy(load_compose())
    plant(compose)
    assert check(compose) != []


def make_secrets(folder: Path) -> dict[str, str]:
    subprocess.run([COMPOSE / "secrets.sh", folder], check=True)
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_secrets_are_random_and_stay(tmp_path: Path) -> None:
    first = make_secrets(tmp_path / "first")
    assert set(first) == set(load_compose()["secrets"])
    assert (tmp_path / "first").stat().st_mode & 0o777 == 0o700
    again = make_secrets(tmp_path / "first")
    assert again == first
    other = make_secrets(tmp_path / "other")
    assert not [name for name in first if first[name] == other[name]]
    assert all(len(value) >= 48 for value in first.values())
    # a secret that was deleted is made anew, the others are not
    (tmp_path / "first" / "ray-token").unlink()
    mended = make_secrets(tmp_path / "first")
    assert {name for name in first if first[name] != mended[name]} == {"ray-token"}


def test_each_service_of_the_store_sees_its_bucket_only(tmp_path: Path) -> None:
    secrets = make_secrets(tmp_path)
    identities = {item["name"]: item for item in json.loads(secrets["s3.json"])["identities"]}
    assert set(identities) == {"admin", "mlflow", "ursa"}
    for name, item in identities.items():
        assert item["credentials"] == [{"accessKey": name, "secretKey": secrets[f"s3-{name}-key"]}]
    for name in ("mlflow", "ursa"):
        assert {action.partition(":")[2] for action in identities[name]["actions"]} == {name}


@pytest.mark.parametrize("name", ["entrypoint.sh", "worker.sh"])
def test_scripts_of_the_image_can_be_run(name: str) -> None:
    path = ROOT / "infra" / "image" / name
    assert path.stat().st_mode & 0o111
    shell = path.read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", path], check=True)


def enter(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "infra" / "image" / "entrypoint.sh", "env"],
        env={"PATH": "/usr/bin:/bin", "URSA_SECRETS_DIR": str(folder)},
        capture_output=True,
        text=True,
    )


def test_secret_files_become_variables(tmp_path: Path) -> None:
    (tmp_path / "RAY_AUTH_TOKEN").write_text("a b$(c)'\"\n")
    (tmp_path / "s3.json").write_text("{}")
    (tmp_path / "FOLDER").mkdir()
    done = enter(tmp_path)
    assert done.returncode == 0
    assert "RAY_AUTH_TOKEN=a b$(c)'\"" in done.stdout.splitlines()
    assert "s3" not in done.stdout
    (tmp_path / "PGPASSWORD").write_text("")
    done = enter(tmp_path)
    assert done.returncode == 1
    assert "PGPASSWORD" in done.stderr


def test_image() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line[:1].isupper()]
    steps = [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]
    (python,) = [rest for step, rest in steps if step == "ARG" and rest.startswith("PYTHON=")]
    assert PINNED.match(python.removeprefix("PYTHON="))
    assert {rest.split()[0] for step, rest in steps if step == "FROM"} == {"${PYTHON}"}
    users = [rest for step, rest in steps if step == "USER"]
    assert users == ["10001:10001"]
    # nothing is installed once the user is set
    assert [step for step, _ in steps][-4:] == ["USER", "ENTRYPOINT", "HEALTHCHECK", "CMD"]
    assert not [rest for step, rest in steps if step in {"ARG", "ENV"} and SECRET.search(rest)]
    assert "-c constraints.txt" in text
    assert "pip check" in text
    ignored = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_versions_are_those_of_the_project() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        service["image"] for service in load_compose()["services"].values() if "build" in service
    }
    assert images == {f"ursa-pipeline:{version}"}
