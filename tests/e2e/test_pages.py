"""What a person sees in a browser after a run: driven with headless Chromium."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.running_services import Finished, mlflow_runs, tags

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with driver"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--window-size=1500,1300", f"--user-data-dir={profile}", "--mute-audio"),
        "--autoplay-policy=no-user-gesture-required",
    ):
        options.add_argument(argument)
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def wait_for(browser: Chrome, *texts: str, limit_s: float = 60) -> str:
    """Wait until all texts are on the page; return the text of the page."""
    body = ""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            body = browser.find_element(By.TAG_NAME, "body").text
        except WebDriverException:
            body = ""
        if all(text in body for text in texts):
            return body
        time.sleep(0.5)
    missing = [text for text in texts if text not in body]
    raise AssertionError(f"{browser.current_url} lacks {missing}; it shows: {body[:2000]}")


@pytest.fixture
def picture(browser: Chrome, tmp_path: Path) -> Callable[[str], None]:
    """Keep a screenshot in the folder of the test, to be looked at."""
    return lambda name: browser.save_screenshot(str(tmp_path / f"{name}.png")) and None


def test_prefect_page_of_the_run(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    url = finished.services.prefect_url
    browser.get(f"{url}/runs/flow-run/{finished.flow_run['id']}")
    wait_for(browser, finished.flow_run["name"], "Completed", "Artifacts", "Logs")
    picture("prefect-run")
    browser.get(f"{url}/artifacts")
    keys = ("data-funnel", "run-summary", "eval-report", "sample-grid", "train-video-pretrain")
    wait_for(browser, *keys)
    picture("prefect-artifacts")
    browser.get(f"{url}/artifacts/key/data-funnel")
    wait_for(browser, "data-funnel")
    browser.get(
        f"{url}/artifacts/artifact/{finished.services.artifacts()['data-funnel']['latest_id']}"
    )
    wait_for(browser, "broken.mp4", "quarantined")
    picture("prefect-funnel")


def test_mlflow_page_of_the_runs(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    url = finished.services.mlflow_url
    browser.get(f"{url}/#/experiments/1/runs")
    wait_for(browser, "ursa", "6 matching runs")
    picture("mlflow-runs")
    runs = {tags(item)["ursa.stage"]: item for item in mlflow_runs(finished.services, "")}
    stage = runs["video-pretrain"]["info"]["run_id"]
    browser.get(f"{url}/#/experiments/1/runs/{stage}/model-metrics")
    wait_for(browser, "train/loss")
    picture("mlflow-curves")


def test_mlflow_plays_a_sample(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    services = finished.services
    runs = {tags(item)["ursa.stage"]: item for item in mlflow_runs(services, "")}
    run_id = runs["evaluate"]["info"]["run_id"]
    listed = services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path=samples"
    )
    clip = next(item["path"] for item in listed["files"] if item["path"].endswith(".mp4"))
    browser.get(f"{services.mlflow_url}/#/experiments/1/runs/{run_id}/artifacts/{clip}")
    deadline = time.monotonic() + 60
    ready = 0
    while ready < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
        ready = browser.execute_script(
            "const v = document.querySelector('video'); return v ? v.readyState : 0"
        )
    picture("mlflow-sample")
    assert ready >= 2, "the clip does not play"


def test_mlflow_page_of_the_model_version(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    browser.get(f"{finished.services.mlflow_url}/#/models/ursa/versions/1")
    wait_for(browser, "Version 1", "challenger", "ursa.registration_key")
    picture("mlflow-version")
