import threading

import pytest

from ursa import storage
from ursa.decisions import earlier_champions, list_decisions, record_decision


def record(root, event, version, champion, before, *, key=None):
    return record_decision(
        root,
        "ursa",
        event,
        registry_made_ms=1,
        version=version,
        champion=champion,
        champion_before=before,
        previous_uri=None,
        reason="because",
        decided_by="me@here",
        key=key,
    )


def test_decisions_are_numbered_and_the_same_one_is_made_once(tmp_path):
    root = str(tmp_path)
    first = record(root, "promoted", "1", "1", None, key="a")
    second = record(root, "refused", "2", "1", "1", key="b")
    assert record(root, "promoted", "1", "1", None, key="a") == first
    assert (first.number, second.number) == (1, 2)
    assert list_decisions(root, "ursa") == [first, second]
    assert list_decisions(root, "other") == []


def test_decisions_at_once_lose_none(tmp_path):
    root = str(tmp_path)
    threads = [
        threading.Thread(target=record, args=(root, "refused", str(i), None, None))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list_decisions(root, "ursa")
    assert [item.number for item in found] == list(range(1, 9))
    assert {item.version for item in found} == set(map(str, range(8)))


@pytest.mark.parametrize("name", ["../other", "..", "a/b", "s3://x"])
def test_a_name_leaves_its_folder_alone(tmp_path, name):
    root = str(tmp_path / "data")
    decision = record_decision(
        root,
        name,
        "refused",
        registry_made_ms=1,
        version="1",
        champion=None,
        champion_before=None,
        previous_uri=None,
        reason="r",
        decided_by="me",
    )
    assert list_decisions(root, name) == [decision]
    folder = storage.local_path(decision.record_uri).resolve().parent.parent
    assert folder == tmp_path / "data" / "releases"


def test_a_second_rollback_goes_back_further(tmp_path):
    root = str(tmp_path)

    def champions(now):
        return earlier_champions(list_decisions(root, "ursa"), now)

    assert champions("1") == []
    record(root, "promoted", "2", "2", "1")  # 1 was champion before anything was on record
    record(root, "refused", "3", "2", "2")
    record(root, "promoted", "4", "4", "2")
    assert champions("4") == ["2", "1"]
    record(root, "rolled_back", "4", "2", "4")
    assert champions("2") == ["1"]
    record(root, "rolled_back", "2", "1", "2")
    assert champions("1") == []
    record(root, "promoted", "4", "4", "1")
    assert champions("4") == ["1"]
    # somebody has moved the alias by hand: the champion on record is the one before
    assert champions("7") == ["4", "1"]


def test_a_damaged_decision_keeps_its_number_and_is_passed_over(tmp_path, caplog):
    root = str(tmp_path)
    first, second = (record(root, "refused", number, None, None) for number in "12")
    path = storage.local_path(second.record_uri)
    path.write_bytes(path.read_bytes().replace(b"because", b"became "))
    third = record(root, "refused", "3", None, None)
    assert third.number == 3
    assert list_decisions(root, "ursa") == [first, third]
    assert "000002.json" in caplog.text
