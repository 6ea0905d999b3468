"""Compare the manifests of infra/k8s with the schemas of Kubernetes; for `make check-infra`.

The schema of a RayCluster comes with its operator and is not at hand; its pods are pods.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

FOLDER = Path(__file__).parent / "k8s"
VERSION = "1.37"


def objects() -> Iterator[dict[str, Any]]:
    """Yield every object of the folder, and the pods of the Ray cluster in its place."""
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name.startswith(("values-", "kustomization")):
            continue
        for item in yaml.safe_load_all(path.read_text()):
            if item["kind"] != "RayCluster":
                yield item
                continue
            spec = item["spec"]
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                name = group.get("groupName", "head")
                metadata = {"name": name, **group["template"]["metadata"]}
                pod = {"metadata": metadata, "spec": group["template"]["spec"]}
                yield {"apiVersion": "v1", "kind": "Pod", **pod}


def main() -> int:
    """Say what is wrong; 0 when nothing is."""
    wrong = 0
    number = 0
    for item in objects():
        number += 1
        try:
            kubernetes_validate.validate(item, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong += 1
            where = ".".join(str(part) for part in error.path)
            sys.stderr.write(
                f"{item['kind']} {item['metadata']['name']}: {where}: {error.message}\n"
            )
    sys.stdout.write(f"{number - wrong} of {number} objects follow Kubernetes {VERSION}\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
