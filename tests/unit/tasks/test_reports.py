import pytest

from tasks import reports


def test_outside_of_a_flow_run_nothing_is_stored() -> None:
    assert not reports.in_flow_run()
    assert reports.start_progress("key", "things") is None
    assert reports.flow_run_tags() == {}
    reports.table("key", [{"a": 1}], "nothing")
    with reports.progress("key", "things") as advance:
        advance(1, 2)


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
