"""Manifests and values of charts: tokens, passwords by reference, policies, pods without rights."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.compose_stack import ROOT

FOLDER = ROOT / "infra" / "k8s"
SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|AUTH_STRING|_KEY|ACCESS_KEY_ID|USERNAME)$")
CHARTS = ("prefect-server", "prefect-worker", "mlflow")
PODS = {
    # labels that pods carry: those of charts are `app.kubernetes.io/name: name of the chart`
    "prefect-server": {"app.kubernetes.io/name": "prefect-server"},
    "prefect-worker": {"app.kubernetes.io/name": "prefect-worker"},
    "mlflow": {"app.kubernetes.io/name": "mlflow"},
    "ray": {"ray.io/cluster": "ursa"},
    "ursa-bootstrap": {"app.kubernetes.io/name": "ursa-bootstrap"},
}


def documents() -> list[dict[str, Any]]:
    names = ("namespace", "networkpolicies", "raycluster", "bootstrap")
    return [
        item for name in names for item in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())
    ]


def values(chart: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / f"values-{chart}.yaml").read_text()))


def one(kind: str) -> dict[str, Any]:
    (found,) = [item for item in documents() if item["kind"] == kind]
    return dict(found)


def pods() -> dict[str, dict[str, Any]]:
    """Return the templates of all pods that are not made by charts."""
    ray = one("RayCluster")["spec"]
    return {
        "bootstrap": one("Job")["spec"]["template"],
        "ray-head": ray["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in ray["workerGroupSpecs"]},
    }


def rights(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """Name what a pod is allowed that it does not need."""
    found = []
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
        found.append("root")
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("system calls")
    if container.get("readOnlyRootFilesystem") is not True:
        found.append("root file system")
    if container.get("allowPrivilegeEscalation") is not False:
        found.append("privileges")
    if container.get("capabilities") != {"drop": ["ALL"]}:
        found.append("capabilities")
    return found


def variables(item: Any) -> Iterator[dict[str, Any]]:
    """Yield every entry of an environment, wherever it stands."""
    if isinstance(item, dict):
        if "name" in item and ("value" in item or "valueFrom" in item):
            yield item
        for value in item.values():
            yield from variables(value)
    elif isinstance(item, list):
        for value in item:
            yield from variables(value)


@pytest.mark.parametrize("name", ["bootstrap", "ray-head", "cpu"])
def test_pods_have_no_rights(name: str) -> None:
    spec = pods()[name]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    (container,) = spec["containers"]
    assert rights(spec["securityContext"], container["securityContext"]) == []
    assert {"cpu", "memory"} == set(container["resources"]["limits"])
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


def test_a_right_too_many_is_found() -> None:
    spec = pods()["bootstrap"]["spec"]
    container = spec["containers"][0]["securityContext"]
    for key, value in {
        "readOnlyRootFilesystem": False,
        "allowPrivilegeEscalation": True,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
    }.items():
        assert len(rights(spec["securityContext"], {**container, key: value})) == 1
    assert rights({**spec["securityContext"], "runAsUser": 0}, container) == ["root"]


@pytest.mark.parametrize(
    ("chart", "path"), [("prefect-server", "server"), ("prefect-worker", "worker"), ("mlflow", "")]
)
def test_pods_of_charts_have_no_rights(chart: str, path: str) -> None:
    chosen = values(chart)
    part = chosen[path] if path else chosen
    container = part.get("containerSecurityContext") or part["securityContext"]
    assert rights(part["podSecurityContext"], container) == []
    assert {"requests", "limits"} == set(part["resources"])


def test_namespace_refuses_pods_with_rights() -> None:
    labels = one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_ray_asks_for_a_token() -> None:
    ray = one("RayCluster")["spec"]
    assert ray["authOptions"] == {"mode": "token", "secretName": "ursa-ray"}
    for name in ("ray-head", "cpu"):
        (container,) = pods()[name]["spec"]["containers"]
        given = {item["name"]: item for item in container["env"]}
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        reference = given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "ursa-ray", "key": "auth_token"}
    worker = {item["name"]: item for item in values("prefect-worker")["worker"]["extraEnvVars"]}
    assert worker["RAY_AUTH_MODE"]["value"] == "token"
    assert "valueFrom" in worker["RAY_AUTH_TOKEN"]


def test_prefect_asks_for_a_password() -> None:
    server = values("prefect-server")["server"]
    assert server["basicAuth"] == {"enabled": True, "existingSecret": "ursa-prefect"}
    given = {item["name"]: item["value"] for item in server["env"]}
    assert given["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert "*" not in given["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
    worker = values("prefect-worker")["worker"]["selfHostedServerApiConfig"]
    assert worker["basicAuth"] == server["basicAuth"]


def test_mlflow_asks_for_a_password() -> None:
    options = values("mlflow")["server"]["value_options"]
    assert options["app_name"] == "basic-auth"
    for key in ("allowed_hosts", "cors_allowed_origins"):
        assert options[key]
        assert "*" not in options[key]
    given = {item["name"]: item for item in values("mlflow")["env"]}
    assert "valueFrom" in given["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert given["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"]["value"] == "false"


def test_nothing_is_published() -> None:
    for chart in CHARTS:
        chosen = values(chart)
        assert not chosen.get("ingress", {}).get("enabled")
        assert chosen.get("service", {}).get("type", "ClusterIP") == "ClusterIP"
    assert not [item for item in documents() if item["kind"] in {"Service", "Ingress", "Gateway"}]


def test_databases_of_charts_with_known_passwords_are_off() -> None:
    server = values("prefect-server")
    assert server["postgresql"] == {"enabled": False}
    assert server["secret"] == {"create": False}
    assert server["externalDatabase"] == {
        "existingSecret": "ursa-prefect",
        "connectionStringSecretKey": "database-url",
    }
    assert "@" not in values("mlflow")["mlflow"]["backendStoreUri"]


def test_secrets_are_references() -> None:
    assert not [item for item in documents() if item["kind"] == "Secret"]
    everything = [*documents(), *(values(chart) for chart in CHARTS)]
    literal = [
        entry["name"]
        for entry in variables(everything)
        if SECRET.search(entry["name"]) and "valueFrom" not in entry
    ]
    assert literal == []
    lines = (FOLDER / "run.env").read_text().splitlines()
    names = [line.split("=")[0] for line in lines if line and not line.startswith("#")]
    assert not [name for name in names if SECRET.search(name)]
    # each is in the list of secrets to make
    readme = (ROOT / "infra" / "README.md").read_text()
    references = {
        (entry["valueFrom"]["secretKeyRef"]["name"], entry["valueFrom"]["secretKeyRef"]["key"])
        for entry in variables(everything)
        if "valueFrom" in entry
    } | {("ursa-prefect", "auth-string"), ("ursa-prefect", "database-url")}
    assert len(references) >= 13
    for name, key in references:
        section = readme.partition(f"generic {name} ")[2].partition("kubectl")[0]
        assert f"{key}=" in section, (name, key)


def policies() -> dict[str, dict[str, Any]]:
    found = [item for item in documents() if item["kind"] == "NetworkPolicy"]
    return {item["metadata"]["name"]: item["spec"] for item in found}


def test_nothing_is_reached_but_what_is_named() -> None:
    found = policies()
    assert found["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert set(found) == {"default-deny", "names", *PODS}
    for name, labels in PODS.items():
        assert found[name]["podSelector"] == {"matchLabels": labels}
    # nothing comes in from everywhere
    for spec in found.values():
        for rule in spec.get("ingress", []):
            assert rule["from"]
            assert all(source.get("podSelector") for source in rule["from"])
    # every pod that a rule names exists
    known = [*PODS.values(), {"app.kubernetes.io/name": "kuberay-operator"}]
    for spec in found.values():
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "podSelector" in peer:
                    assert peer["podSelector"]["matchLabels"] in known


def test_every_way_out_has_a_way_in() -> None:
    found = policies()

    def ways(direction: str, key: str) -> set[tuple[str, str, int]]:
        names = {tuple(labels.items()): name for name, labels in PODS.items()}
        return {
            (name, names[tuple(peer["podSelector"]["matchLabels"].items())], port["port"])
            for name, spec in found.items()
            for rule in spec.get(direction, [])
            for peer in rule.get(key, [])
            if tuple(peer.get("podSelector", {}).get("matchLabels", {}).items()) in names
            for port in rule.get("ports", [{"port": 0}])
        }

    going = ways("egress", "to")
    coming = {(source, target, port) for target, source, port in ways("ingress", "from")}
    assert going == coming
    assert ("prefect-worker", "ray", 0) in going
    assert not [way for way in going if way[:2] == ("ray", "prefect-server")]


def test_images_are_exact() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    own = {f"{image['newName']}:{image['newTag']}"}
    own.add(pods()["bootstrap"]["spec"]["containers"][0]["image"])
    server = values("prefect-server")["global"]["prefect"]["image"]
    own.add(f"{server['repository']}:{server['prefectTag']}")
    worker = values("prefect-worker")["worker"]["image"]
    own.add(f"{worker['repository']}:{worker['prefectTag']}")
    mlflow = values("mlflow")["image"]
    own.add(f"{mlflow['repository']}:{mlflow['tag']}")
    assert own == {f"registry.example.com/ursa-pipeline:{version}"}
    for name in ("ray-head", "cpu"):
        assert pods()[name]["spec"]["containers"][0]["image"] == image["name"]


def test_versions_are_those_that_are_installed() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert one("RayCluster")["spec"]["rayVersion"] == pins["ray"]
    assert f"v{pins['mlflow']}" in (FOLDER / "values-mlflow.yaml").read_text()


def test_settings_are_known() -> None:
    """The settings of runs are variables that are read (infra/.env.example) or libraries'."""
    lines = (FOLDER / "run.env").read_text().splitlines()
    names = {line.split("=")[0] for line in lines if line.startswith("URSA_")}
    example = (ROOT / "infra" / ".env.example").read_text()
    assert names
    assert not [name for name in names if not re.search(rf"^#? ?{name}=", example, re.MULTILINE)]
