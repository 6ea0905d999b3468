import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from tests import browser, data_roots
from ursa.data.clips import read_selection
from ursa.ingestion import select_clips
from ursa.inspection.card import MOTION_SHARES, data_card, escape
from ursa.inspection.pictures import score_histograms

STRUCTURE = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "div", "p", "br"}
CONTENT = {"b", "i", "span", "table", "tr", "th", "td", "figure", "img", "figcaption"}


SHARP = {"score": "sharpness", "scorer": "laplacian-variance-clip-size"}


class Elements(HTMLParser):
    """All elements with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_texts_of_users_stay_texts(root):
    page = data_card(root.uri, config=root.config)
    elements = Elements(page)
    assert {tag for tag, _ in elements.found} <= STRUCTURE | CONTENT
    assert "<script" not in page.lower()
    assert data_roots.CAPTION in elements.text
    assert "<b>pan & scan.mp4" in elements.text  # the name of a file


def test_the_card_loads_nothing(root):
    elements = Elements(data_card(root.uri))
    sources = [attrs["src"] for tag, attrs in elements.found if tag == "img"]
    assert len(sources) == 1 + 5 + len(MOTION_SHARES)
    assert all(source.startswith("data:image/") for source in sources)
    assert not any({"href", "onload", "onerror"} & set(attrs) for _, attrs in elements.found)
    assert "url(" not in elements.text


def test_the_card_shows_counts_reasons_and_tokens(root):
    text = Elements(data_card(root.uri, config=root.config)).text
    for part in ("quarantined: not_a_video", "rejected: too_dark", "128x96", "sidecar", "template"):
        assert part in text
    assert "Dashed: the thresholds of this selection." in text
    assert f"{root.datasets.video_train.num_tokens:,}" in text
    assert data_card(root.uri) == data_card(root.uri)


def test_the_card_shows_what_a_motion_prompt_means(root):
    """From the stillest kept clip to the fastest."""
    text = Elements(data_card(root.uri)).text
    kept = [
        item.clip.scores.motion_px_per_s for item in read_selection(root.selection) if item.kept
    ]
    for motion in (min(kept), max(kept)):
        assert f"motion={motion:.1f}, ..." in text


def test_missing_clips_are_said(root):
    for path in root.media():
        path.unlink()
    text = Elements(data_card(root.uri)).text
    number = 5 + len(MOTION_SHARES)
    assert text.count("the clip is missing, damaged or not to be decoded") == number


def test_the_card_shows_the_thresholds_of_the_record(root):
    """No preset has made this root, and none is named."""
    config = data_roots.root_config(
        selection={"min_sharpness": None, "rules": [SHARP | {"keep_fraction": 0.5}]}
    )
    made = select_clips(root.selection.clips, config.selection, output_uri=root.uri)
    text = Elements(data_card(root.uri, selection_uri=made.manifest_uri)).text
    (item,) = [item for item in made.thresholds if item.key == "rules.0"]
    for part in ("rules.0", SHARP["scorer"], f"{item.least:.6g}", "from the clips"):
        assert part in text
    assert f"rejected: too_low:{SHARP['scorer']}/sharpness" in text


@pytest.mark.parametrize("text", ["<script>&\"'", "\udcff", "a\x00b"])
def test_any_text_can_be_written(text):
    assert not re.search(r"[<>\"']", escape(text))
    escape(text).encode()


def test_scores_that_are_not_measured_are_left_out(root):
    table = pa.table({"sharpness": [1.0, None, 3.0], "luminance": pa.nulls(3, pa.float64())})
    kept = np.array([True, True, False])
    assert score_histograms(table, kept, root.selection.thresholds).startswith(b"\x89PNG")
    assert score_histograms(table.select(["luminance"]), kept, ()) is None


@browser.needs_browser
def test_a_browser_shows_all_pictures_and_runs_nothing(root, tmp_path):
    page = tmp_path / "card.html"
    page.write_text(data_card(root.uri, config=root.config), "utf-8")
    with browser.open_browser(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        browser.wait_for(driver, "Rejected clips", data_roots.CAPTION)
        widths = driver.execute_script("return [...document.images].map(i => i.naturalWidth)")
        overflow = driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert driver.get_log("browser") == []
    assert len(widths) == 6 + len(MOTION_SHARES)
    assert min(widths) >= 480
    assert overflow == 0
