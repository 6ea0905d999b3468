"""The page of `ursa demo`, driven with headless Chromium."""

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests import media
from tests.browser import needs_browser, open_browser, wait_for, wait_until
from ursa.generation import UrsaPipeline
from ursa.video.encode import write_video

URSA = [sys.executable, "-c", "from ursa.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def url(exported_model) -> Iterator[str]:
    command = [*URSA, "demo", "--model", exported_model.directory_uri, "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()
        yield address[0] if address else ""
        process.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def fill(browser: Chrome, element: str, value) -> None:
    field = browser.find_element(By.CSS_SELECTOR, f"#{element} textarea, #{element} input")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def wait_until_said(browser: Chrome, text: str) -> None:
    said = "document.querySelector('#said textarea').value"
    wait_until(browser, f"return {said}.includes('{text}')")


@needs_browser
def test_a_clip_from_a_prompt_and_a_first_frame(url, browser, exported_model, tmp_path):
    assert url.startswith("http://127.0.0.1:")
    browser.get(url)
    wait_for(browser, "Generate", "Prompt", "Seed")
    fill(browser, "prompt", "a red ball rolls <script>alert(1)</script>")
    fill(browser, "steps", 6)
    fill(browser, "seed", 5)
    fill(browser, "motion", 40)
    first = media.texture(16, 24, seed=1, grain=1.0)
    Image.fromarray(first).save(tmp_path / "first.png")
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(
        str(tmp_path / "first.png")
    )
    wait_until(browser, "return document.querySelector('#image img')")
    browser.find_element(By.ID, "generate").click()
    wait_until_said(browser, "5 frames, seed 5")
    clip = "document.querySelector('#clip video')"
    source = wait_until(browser, f"return {clip} && {clip}.readyState >= 2 && {clip}.src")
    browser.save_screenshot(str(tmp_path / "demo.png"))
    wait_for(browser, "From noise to the clip: after steps 1, 2, 3, 4, 5, 6")
    way = browser.execute_script(
        "const i = document.querySelector('#way img'); return [i.naturalWidth, i.naturalHeight]"
    )
    assert way == [4 * 24, 6 * 16]

    # the clip is, byte for byte, that of the same call in Python
    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    frames = pipeline(
        "a red ball rolls <script>alert(1)</script>",
        image=first,
        motion_score=40.0,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).frames[0]
    write_video(tmp_path / "expected.mp4", frames, pipeline.defaults.fps)
    shown = urllib.request.urlopen(source).read()
    assert shown == (tmp_path / "expected.mp4").read_bytes()

    # nothing was asked of another host
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert asked
    assert [name for name in asked if not name.startswith((url, "blob:", "data:"))] == []


@needs_browser
def test_a_picture(url, browser, tmp_path):
    browser.get(url)
    wait_for(browser, "Generate", "Prompt", "Seed")
    fill(browser, "frames", 1)
    fill(browser, "steps", 2)
    browser.find_element(By.ID, "generate").click()
    wait_until_said(browser, "1 frames, seed 0")
    browser.save_screenshot(str(tmp_path / "picture.png"))
    assert (
        browser.execute_script("return document.querySelector('#picture img').naturalWidth") == 24
    )


def test_a_port_in_use_is_named(exported_model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [*URSA, "demo", "--model", exported_model.directory_uri, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: --port {port} cannot be opened on 127.0.0.1: ")
    assert "in use" in line
