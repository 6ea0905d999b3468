from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests import browser
from ursa.inspection.gallery import samples_page
from ursa.video.encode import write_video

PROMPTS = {
    "t2v-0": 'a <script>alert("x")</script> & a tree',
    "i2v-0": "",
    "t2v-1": "'><img src=x onerror=alert(1)> ü 木",
}


@pytest.fixture
def samples(tmp_path: Path) -> str:
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    for name in PROMPTS:
        write_video(tmp_path / f"{name}.mp4", frames, 12.0)
    rows = "".join(f"{name}\t{prompt}\n" for name, prompt in PROMPTS.items())
    (tmp_path / "prompts.tsv").write_text(rows, "utf-8")
    return str(tmp_path)


class Captions(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_prompts_stay_texts(samples: str) -> None:
    page = samples_page(samples, "<b>title")
    found = Captions(page)
    assert found.tags.count("video") == len(PROMPTS)
    assert not {"script", "b", "img"} & set(found.tags)
    for prompt in PROMPTS.values():
        assert prompt in found.text
    assert "no prompt" in found.text
    assert page == samples_page(samples, "<b>title")


def test_folder_without_samples_says_so(tmp_path: Path) -> None:
    (tmp_path / "prompts.tsv").write_text("")
    assert "no samples" in samples_page(str(tmp_path), "nothing")


@browser.needs_browser
def test_clips_play_beside_their_prompts(samples: str, tmp_path: Path) -> None:
    page = tmp_path / "gallery.html"
    page.write_text(samples_page(samples, "Samples"), "utf-8")
    with browser.open_browser(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        browser.wait_until(
            driver,
            "return [...document.querySelectorAll('video')].every(item => item.currentTime > 0)",
        )
        captions = driver.execute_script(
            "return [...document.querySelectorAll('figcaption')].map(item => item.innerText)"
        )
        driver.save_screenshot(str(tmp_path / "gallery.png"))
    for caption, (name, prompt) in zip(captions, PROMPTS.items(), strict=True):
        assert caption.startswith(prompt or "no prompt")
        assert name in caption
