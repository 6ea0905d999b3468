"""One run of the whole pipeline, shared by all end-to-end tests."""

import shutil

import pytest

from tests import running_services
from tests.running_services import ROOT, Finished, run_pipeline

VIDEOS = ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    services = running_services.start()
    source = tmp_path_factory.mktemp("videos")
    for name in VIDEOS:
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, source)
    (source / "broken.mp4").write_bytes(b"this is no video\n" * 100)
    done = run_pipeline(services, source, URSA_LAUNCHER="ray")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return Finished(services, source, done.stdout, services.flow_run(done.stdout))
