from pathlib import Path
from typing import Any

import pytest

from tasks import reports
from tests import factories
from ursa.texts import markdown_text


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
    assert lines[2] == (100.0, "files: done in 0 s")


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
