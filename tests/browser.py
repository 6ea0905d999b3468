"""Headless Chromium, for tests of what a person sees."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(not (_CHROMIUM and _DRIVER), reason="no Chromium with driver")


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Chrome]:
    """Open a browser of its own with an empty profile."""
    options = ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--window-size=1500,1300", f"--user-data-dir={profile}", "--mute-audio"),
        "--autoplay-policy=no-user-gesture-required",
    ):
        options.add_argument(argument)
    driver = Chrome(options=options, service=Service(str(_DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def wait_until(browser: Chrome, script: str, limit_s: float = 60) -> Any:
    """Wait until a script returns something that is true; return it."""
    deadline = time.monotonic() + limit_s
    while not (found := browser.execute_script(script)):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {limit_s} s still not so: {script}")
        time.sleep(0.2)
    return found


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
