from pathlib import Path
from typing import Any

import pytest

from tasks import reports
from tests import factories


def test_outside_of_a_flow_run_nothing_is_stored() -> None:
    assert not reports.in_flow_run()
    assert reports.start_progress("key", "things") is None
    assert reports.flow_run_tags() == {}
    reports.table("key", [{"a": 1}], "nothing")
    with reports.progress("key", "things") as advance:
        advance(1, 2)


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
        ("a\nb|c.mp4", "a\\nb\\|c.mp4"),
        ("caf\udce9.mp4", "caf\\udce9.mp4"),
        ("plain.mp4", "plain.mp4"),
    ],
)
def test_hostile_names_fit_into_a_table(name: str, expected: str) -> None:
    assert reports.cell(name) == expected
    reports.cell(name).encode("utf-8")


def test_artifact_keys_have_dashes() -> None:
    assert reports.slug("image_pretrain") == "image-pretrain"
