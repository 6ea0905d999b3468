"""What a person sees in a browser after a run: driven with headless Chromium."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tasks.tracking import TrackedRun
from tests.browser import needs_browser, open_browser, wait_for, wait_until
from tests.running_services import Finished, mlflow_runs, tags

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), needs_browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def picture(browser: Chrome, tmp_path: Path) -> Callable[[str], None]:
    """Keep a screenshot in the folder of the test, to be looked at."""
    return lambda name: browser.save_screenshot(str(tmp_path / f"{name}.png")) and None


def test_prefect_page_of_the_run(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    url = finished.services.prefect_url
    (run,) = mlflow_runs(finished.services, "tags.`ursa.stage` = 'run' and tags.`ursa.alias` != ''")
    browser.get(tags(run)["prefect.flow_run_url"])
    wait_for(browser, finished.flow_run["name"], "Completed", "Artifacts", "Logs")
    picture("prefect-run")
    summary = finished.services.artifacts()["run-summary"]["data"]
    links = re.findall(r"\((http[^)]*/artifacts/key/([^)]*))\)", summary)
    assert len(links) > 2
    for link, key in links:
        browser.get(link)
        assert "not found" not in wait_for(browser, key).lower()
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
    parent = TrackedRun(
        tracking_uri=url,
        experiment_id="1",
        run_id=runs["run"]["info"]["run_id"],
        spool_uri="",
    )
    browser.get(parent.url)
    wait_for(browser, "ursa version 1", "Prefect run", "data set version")
    picture("mlflow-run")
    stage = runs["video-pretrain"]["info"]["run_id"]
    browser.get(f"{url}/#/experiments/1/runs/{stage}/model-metrics")
    wait_for(browser, "train/loss")
    picture("mlflow-curves")
    browser.get(TrackedRun(tracking_uri=url, experiment_id="1", run_id=stage, spool_uri="").url)
    # the menu for training, not the one for language-model applications
    assert "Playground" not in wait_for(browser, "video-pretrain", "Model registry")


def test_mlflow_slides_through_the_samples_of_a_stage(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    """The slider begins at step 0, which has a picture, and moves to those of later steps."""
    runs = {tags(item)["ursa.stage"]: item for item in mlflow_runs(finished.services, "")}
    run_id = runs["video-pretrain"]["info"]["run_id"]
    url = finished.services.mlflow_url
    browser.get(f"{url}/#/experiments/1/runs/{run_id}/model-metrics")
    wait_for(browser, "train/loss")
    find = "[...document.querySelectorAll('[role=slider]')].find(e => e.ariaValueMin == '0')"
    # charts are drawn when they come into sight
    heading = "[...document.querySelectorAll('[aria-expanded]')]"
    heading += ".find(e => e.innerText.startsWith('Model metrics'))"
    wait_until(browser, f"{heading}?.scrollIntoView(); return {find}")
    slider = browser.execute_script(f"return {find}")
    shown = "[...document.querySelectorAll('img')].filter(e => e.naturalWidth)"
    shown += (
        ".map(e => decodeURIComponent(e.src).match(/samples.step.(\\d+)/)?.[1]).filter(Boolean)"
    )
    for step in ("0", "2", "4"):
        wait_until(browser, f"return {shown}.includes('{step}')")
        picture(f"mlflow-slider-{step}")
        slider.send_keys(Keys.ARROW_RIGHT)


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
    video = "document.querySelector('video')"
    wait_until(browser, f"return {video} && {video}.readyState >= 2")
    picture("mlflow-sample")


def test_mlflow_shows_which_prompt_made_which_clip(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    link = finished.services.artifacts()["sample-grid"]
    gallery = re.search(r"http\S*gallery\.html\S*", str(link["description"]))
    assert gallery, link
    browser.get("about:blank")  # a page of MLflow that is open does not go to another artifact
    browser.get(gallery[0])
    wait_until(browser, "return document.querySelector('iframe')")
    picture("mlflow-gallery")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    video = "document.querySelector('video')"
    wait_until(browser, f"return {video} && {video}.readyState >= 2 && {video}.currentTime > 0")
    captions = browser.execute_script(
        "return [...document.querySelectorAll('figcaption')].map(item => item.innerText)"
    )
    browser.switch_to.default_content()
    assert len(captions) == 2, "a prompt from noise, and from a first frame"
    assert all("from" in caption for caption in captions)


def test_mlflow_shows_the_report_of_the_run(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    link = str(finished.services.artifacts()["run-report"]["data"])
    address = re.search(r"\((http[^)]*report\.html[^)]*)\)", link)
    assert address, link
    browser.get("about:blank")  # a page of MLflow that is open does not go to another artifact
    browser.get(address[1])
    wait_until(browser, "return document.querySelector('iframe')")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    videos = "[...document.querySelectorAll('video')]"
    playing = f"{videos}.every(item => item.readyState >= 2 && item.currentTime > 0)"
    wait_until(browser, f"return {videos}.length == 2 && {playing}")
    images = "[...document.querySelectorAll('img')]"
    widths = browser.execute_script(f"return {images}.map(item => item.naturalWidth)")
    # schedule, losses, heat maps, tokens of two captions, four clips and their copies, memory
    assert len(widths) == 10
    assert all(widths)
    text = browser.execute_script("return document.body.innerText")
    assert "quarantined: not_a_video" in text
    assert "async-finetune" in text
    for number, selector in enumerate(("h1", "video", ".lineage")):
        browser.execute_script(f"document.querySelector('{selector}').scrollIntoView()")
        picture(f"mlflow-report-{number}")
    browser.switch_to.default_content()


def test_mlflow_page_of_the_model_version(
    browser: Chrome, finished: Finished, picture: Callable[[str], None]
) -> None:
    browser.get(f"{finished.services.mlflow_url}/#/models/ursa/versions/1")
    wait_for(browser, "Version 1", "challenger", "ursa.registration_key")
    picture("mlflow-version")
