import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tasks import reports
from tasks.options import show_library_logs
from tests import factories
from ursa.artifacts import FailureReason, IngestedVideo, SelectedClip, SourceVideo, VideoInfo
from ursa.texts import markdown_code, markdown_text


def test_outside_of_a_flow_run_nothing_is_stored() -> None:
    assert not reports.in_flow_run()
    assert reports.start_progress("key", "things") is None
    assert reports.flow_run_tags() == {}
    reports.table("key", [{"a": 1}], "nothing")
    with reports.progress("key", "things", total=2) as advance:
        advance(1, 2)
    with reports.step_progress("key", 100) as show:
        show(20, {"tokenizer/psnr": 21.0})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """What progress artifacts show, one after another."""
    shown: list[tuple[float, str]] = []
    monkeypatch.setattr(reports, "in_flow_run", lambda: True)
    monkeypatch.setattr(reports, "UPDATE_EVERY_S", 0.0)

    def create(*, progress: float, key: str, description: str) -> str:
        assert key == "key"
        shown.append((progress, description))
        return "00000000-0000-0000-0000-000000000000"

    monkeypatch.setattr(reports, "create_progress_artifact", create)
    monkeypatch.setattr(
        reports,
        "update_progress_artifact",
        lambda **values: shown.append((values["progress"], values["description"])),
    )
    return shown


def test_first_line_says_how_much_there_is(lines: list[tuple[float, str]]) -> None:
    with reports.progress("key", "files", total=7, before=3) as advance:
        advance(2, 4)
    assert lines[0] == (0.0, "3 of 7 files")
    assert lines[1][1].startswith("5 of 7 files, ")
    assert lines[2] == (100.0, "4 files: done in 0 s; 3 were known")


def test_progress_of_a_fit_shows_its_quality(lines: list[tuple[float, str]]) -> None:
    with reports.step_progress("key", 80) as show:
        show(20, {"tokenizer/loss": 0.1, "tokenizer/psnr": 21.04})
        show(80, {"tokenizer/psnr_train": 25.0})
    assert lines == [
        (0.0, "step 0 of 80"),
        (25.0, "step 20 of 80, PSNR 21.0 dB"),
        (100.0, "step 80 of 80"),
        (100.0, "done in 0 s"),
    ]


def test_shots_that_are_too_short_are_a_share_of_all_shots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    selection = factories.commit_selection(str(tmp_path), [])
    clips = selection.clips.model_copy(update={"num_clips": 3, "num_dropped_shots": 9})
    tables: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr(reports, "table", lambda key, rows, _: tables.update({key: rows}))
    reports.data_funnel(clips, selection, [])
    percent = {row["step"]: row["percent"] for row in tables["data-funnel"]}
    assert percent["clips made"] == "100.0"
    assert percent["shots too short"] == "75.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb|c.mp4", r"a\\nb\|c.mp4"),
        ("caf\udce9.mp4", r"caf\\udce9.mp4"),
        ("plain.mp4", "plain.mp4"),
    ],
)
def test_hostile_names_fit_into_a_table(name: str, expected: str) -> None:
    assert markdown_text(name) == expected
    markdown_text(name).encode("utf-8")


def test_artifact_keys_have_dashes() -> None:
    assert reports.slug("image_pretrain") == "image-pretrain"


HOSTILE = (
    "a\nforged\r\x1b[31m\u202e<script>alert(1)</script><img src=x onerror=alert(1)>"
    "[x](javascript:alert(1))\\[y\\](javascript:alert(2))|`b`"
)
RENDER = MarkdownIt("commonmark", {"html": True}).enable("table")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the artifacts of a run hold, with their descriptions."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(reports, "in_flow_run", lambda: True)

    def store(data: Any, *, key: str, description: str, **more: str) -> None:
        found[key] = [data, description, *more.values()]

    def store_link(link: str, *, key: str, description: str, **more: str) -> None:
        store(link, key=key, description=description, **more)

    for name in ("create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(reports, name, store)
    monkeypatch.setattr(reports, "create_link_artifact", store_link)
    return found


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def test_names_captions_and_reasons_stay_texts_in_all_artifacts(
    stored: dict[str, Any], tmp_path: Path
) -> None:
    clip_path = tmp_path / "clip.mp4"
    clip_path.write_bytes(b"x")
    info = VideoInfo(codec="x", width_px=8, height_px=8, fps=8.0, num_frames=8, duration_s=1.0)
    clip = factories.clip_of(clip_path, caption=HOSTILE, info=info)
    clip = clip.model_copy(update={"source_uri": f"s3://bucket/{HOSTILE}"})
    selection = factories.commit_selection(str(tmp_path), [])
    source = SourceVideo(uri=f"s3://bucket/{HOSTILE}", num_bytes=1, etag="x")
    failure = IngestedVideo(
        source=source,
        source_sha256=None,
        info=None,
        clips=(),
        failure=FailureReason.NOT_A_VIDEO,
        detail=HOSTILE,
    )
    reports.data_funnel(selection.clips, selection, [failure])
    reports.clip_examples(
        [
            SelectedClip(clip=clip, kept=True, reason=None, split="train"),
            SelectedClip(clip=clip, kept=False, reason="too_dark", split=None),
        ]
    )
    reports.stage_summary("image_pretrain", {"train/loss": 1.0}, {HOSTILE: "fact"})
    reports.run_summary("title", [(HOSTILE, "value"), ("source", markdown_code(HOSTILE))])
    reports.table("dataset-version", [{"file": HOSTILE, "files": 1}], "Version 1.")
    assert set(stored) == {
        *("data-funnel", "clip-examples", "train-image-pretrain", "run-summary"),
        "dataset-version",
    }
    shown = list(texts(list(stored.values())))
    assert sum("alert" in text for text in shown) >= 6
    for text in shown:
        page = RENDER.render(text)
        assert not re.search(r"<(script|img|a|iframe|svg)[ >]", page), page
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page), page
        for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL):
            assert row.count("<td>") + row.count("<th>") in {2, 5}, row


def test_a_link_and_a_headline_show_the_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect writes the text of a link into Markdown as it is."""
    pages: list[str] = []
    monkeypatch.setattr(reports, "in_flow_run", lambda: True)
    monkeypatch.setattr(
        reports,
        "create_link_artifact",
        lambda link, *, link_text, **_: pages.append(f"[{link_text}]({link})"),
    )
    monkeypatch.setattr(
        reports, "create_markdown_artifact", lambda markdown, **_: pages.append(markdown)
    )
    name = "a] [model](http://evil) #x"
    reports.link("model-version", "http://page", name, "")
    reports.run_summary(name, [])
    link, summary = (RENDER.parse(page) for page in pages)
    assert link[1].children is not None
    shown = [part.content for part in link[1].children if part.type == "text"]
    assert ("".join(shown), link[1].children[0].attrGet("href")) == (name, "http://page")
    assert summary[1].children is not None
    assert "".join(part.content for part in summary[1].children) == name
    assert all("link" not in part.type for part in summary[1].children)


def test_lines_of_the_library_are_printable_in_the_log_of_a_run() -> None:
    stream = io.StringIO()
    places = [logging.getLogger(name) for name in ("ursa", "prefect.flow_runs")]
    handlers = [logging.StreamHandler(stream) for _ in places]
    for place, handler in zip(places, handlers, strict=True):
        place.addHandler(handler)
    level = places[0].level
    try:
        show_library_logs()
        show_library_logs()
        logging.getLogger("ursa.ingestion").warning("%s: quarantined", HOSTILE)
        extra = {"flow_run_name": "a", "flow_name": "b", "flow_run_id": "c"}
        places[1].error("Finished in state Failed(%r)", HOSTILE, extra=extra)
        places[1].error(HOSTILE, extra=extra)
    finally:
        places[0].setLevel(level)
        for place, handler in zip(places, handlers, strict=True):
            place.removeHandler(handler)
    assert all(len(handler.filters) == 1 for handler in handlers)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3, lines
    assert all("\\x1b[31m" in line and line.isprintable() for line in lines)
