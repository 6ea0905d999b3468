"""The whole run with two training processes."""

import shutil
from pathlib import Path

import pytest

from tests import running_services
from tests.running_services import (
    ROOT,
    STAGES,
    TINY,
    Running,
    changed,
    metric_history,
    mlflow_runs,
    run_arguments,
    tags,
    versions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("tree_hand.mp4", "city_night.mp4"):
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, folder)
    return folder


def losses(services: Running, source: Path, launcher: str, workers: int) -> dict[str, list[float]]:
    """Run all of it and return the loss curve of each stage."""
    name = f"workers-{launcher}-{workers}"
    done = running_services.run_script(
        *run_arguments(source, changed({"release": {"model_name": name}}, TINY)),
        environment={
            **services.environment,
            "URSA_LAUNCHER": launcher,
            "URSA_NUM_TRAIN_WORKERS": str(workers),
            "URSA_DATA_URI": str(services.folder / name),
        },
        limit_s=700,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert len(versions(services, name)) == 1
    flow_run = services.flow_run(done.stdout)
    found = mlflow_runs(services, f"tags.`prefect.flow_run_id` = '{flow_run['id']}'")
    ids = {tags(item)["ursa.stage"]: item["info"]["run_id"] for item in found}
    return {
        stage: [point["value"] for point in metric_history(services, ids[stage], "train/loss")]
        for stage in STAGES
    }


def test_two_workers_give_the_curves_of_one(services: Running, source: Path) -> None:
    one = losses(services, source, "local", 1)
    assert all(len(curve) == 4 for curve in one.values())
    for launcher in ("local", "ray"):
        two = losses(services, source, launcher, 2)
        assert two == {stage: pytest.approx(curve, rel=1e-5) for stage, curve in one.items()}
