"""Decisions about versions, whatever befalls the registry: restored, deleted, killed, at once."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tasks import releases
from tasks.doctor import Patient
from tests.registries import (
    add_version,
    bare_registry,
    champion_of,
    events,
    killed,
    run_ursa,
    store_uri,
)
from ursa.artifacts import EvalReport
from ursa.decisions import list_decisions
from ursa.errors import ConfigError

pytestmark = pytest.mark.integration

__all__ = ["store_uri"]


def kill_after_the_record(registry: releases.Registry, version: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            releases.promote(registry, version, "a reason")


def gate_report(key: str, *failed: str) -> EvalReport:
    """An evaluation, as far as decisions look at it."""
    return EvalReport.model_construct(
        manifest_uri=f"/{key}",
        fingerprint=key,
        gate_passed=not failed,
        failed_gates=failed,
        comparison=None,
    )


@pytest.mark.parametrize("is_old", [False, True], ids=["records", "records of an older release"])
def test_a_restored_registry_carries_out_no_decision_on_another_model(
    tmp_path: Path, monkeypatch: Any, is_old: bool
) -> None:
    database = tmp_path / "mlflow.db"
    registry = bare_registry(f"sqlite:///{database}", "restored", tmp_path / "root")
    if is_old:  # numbers alone, and they were made long before
        record = releases.record_decision
        monkeypatch.setattr(releases, "_SKEW_S", 1.0)
        monkeypatch.setattr(
            releases,
            "record_decision",
            lambda *given, **options: record(*given, **{**options, "models": {}}),
        )
    releases.finish_version(registry, add_version(registry, "fair"), gate_report("fair"))
    shutil.copy(database, tmp_path / "copy.db")
    releases.promote(registry, add_version(registry, "good"), "it is")
    assert champion_of(registry) == "2"
    if is_old:
        time.sleep(2.1)  # decisions are dated to the second
    shutil.copy(tmp_path / "copy.db", tmp_path / "restored.db")
    registry = bare_registry(f"sqlite:///{tmp_path}/restored.db", "restored", tmp_path / "root")
    assert add_version(registry, "bad") == "2"
    assert releases.void(registry, releases.pending_decisions(registry)[0]) == (
        "version 2 is another model now"
    )
    releases.finish_version(registry, "2", gate_report("bad", "the loss is worse"))
    assert champion_of(registry) == "1"
    assert events(registry) == [
        ("promoted", "1", "1"),
        ("promoted", "2", "2"),
        ("voided", "2", "1"),
        ("refused", "2", "1"),
    ]
    tags = registry.client.get_model_version("restored", "2").tags
    assert tags["ursa.decision"] == "refused by a test: the loss is worse"
    assert releases.moved_alias(registry) is None
    # the lost one is no champion to go back to, the one that has its number neither
    releases.promote(registry, add_version(registry, "better"), "it is")
    assert releases.former_champions(registry, "3") == ["1"]
    assert releases.rollback(registry, None).champion == "1"
    # what a person rolled back is not what has its number
    assert "rolled it back" in str(releases._obstacle(registry, "3", gate_report("better")))
    assert "rolled it back" not in str(releases._obstacle(registry, "2", gate_report("bad")))


def test_a_decision_on_the_same_model_is_carried_out_after_a_restore(tmp_path: Path) -> None:
    """Numbers may be given in the same order again: then nothing has changed."""
    database = tmp_path / "mlflow.db"
    registry = bare_registry(f"sqlite:///{database}", "same", tmp_path / "root")
    shutil.copy(database, tmp_path / "copy.db")
    for key in ("fair", "good"):
        releases.promote(registry, add_version(registry, key), "it is")
    shutil.copy(tmp_path / "copy.db", tmp_path / "restored.db")
    registry = bare_registry(f"sqlite:///{tmp_path}/restored.db", "same", tmp_path / "root")
    for key in ("fair", "good"):
        add_version(registry, key)
    assert [item.champion for item in releases.settle(registry)] == ["1", "2"]
    assert champion_of(registry) == "2"
    assert len(events(registry)) == 2


@pytest.mark.parametrize("by", ["promote", "rollback", "the flow", "ursa doctor --fix"])
def test_a_pending_decision_on_a_version_that_is_gone_blocks_nothing(
    store_uri: str, tmp_path: Path, by: str
) -> None:
    registry = bare_registry(store_uri, f"gone, {by}", tmp_path)
    for key in "abc":
        add_version(registry, key)
    for version in "12":
        releases.promote(registry, version, "a reason")
    kill_after_the_record(registry, "3")
    registry.client.delete_model_version(registry.name, "3")
    match by:
        case "promote":
            releases.promote(registry, "1", "a reason")
        case "rollback":
            assert releases.rollback(registry, "a reason").champion == "1"
        case "the flow":
            releases.finish_version(registry, add_version(registry, "d"), gate_report("d", "worse"))
        case _:
            (told,) = look_at(store_uri, registry, fix=False)
            assert told[0] == "wrong"
            assert "was not carried out: version 3 is not there any more" in told[1]
            (told,) = look_at(store_uri, registry, fix=True)
            assert told[0] == "mended"
            assert "passed over, which is on record now" in told[1]
            assert look_at(store_uri, registry, fix=False) == []
    assert champion_of(registry) == ("1" if by in {"promote", "rollback"} else "2")
    assert ("voided", "3", "2") in events(registry)


def test_a_person_sees_that_a_decision_was_passed_over(store_uri: str, tmp_path: Path) -> None:
    """What MLflow says of itself is not shown: nothing else is on stderr."""
    registry = bare_registry(store_uri, "damaged", tmp_path)
    for key in "abcd":
        releases.promote(registry, add_version(registry, key), "a reason")
    done = run_ursa(registry, store_uri, "rollback")
    assert (done.stdout, done.stderr) == ("champion is version 3, was 4\n", "")
    record = Path(list_decisions(registry.root_uri, registry.name)[1].record_uri)
    record.write_bytes(b"x\ny")
    done = run_ursa(registry, store_uri, "rollback")
    assert (done.returncode, done.stdout) == (0, "champion is version 2, was 3\n")
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(f"a decision is passed over: {record}: not a manifest")


def look_at(store_uri: str, registry: releases.Registry, *, fix: bool) -> list[tuple[str, str]]:
    found = Patient(store_uri, registry.root_uri, fix, {}).leftovers()
    return [(item.state, item.text) for item in found if f" {registry.name}" in item.text]


@pytest.mark.parametrize("by", ["rollback", "promote", "the flow", "ursa doctor --fix"])
def test_a_champion_that_was_deleted_in_mlflow_gives_way_to_the_one_before(
    store_uri: str, tmp_path: Path, by: str
) -> None:
    registry = bare_registry(store_uri, f"deleted, {by}", tmp_path)
    for key in "abcd":
        add_version(registry, key)
    for version in "123":
        releases.promote(registry, version, "a reason")
    for version in "32":
        registry.client.delete_model_version(registry.name, version)
    assert champion_of(registry) is None
    assert releases.lost_champion(registry) == ("3", "1")
    match by:
        case "rollback":
            decision = releases.rollback(registry, "gone")
            assert decision.reason == "version 3, the champion, is not there any more; gone"
        case "promote":
            assert releases.promote(registry, "1", None) is None
        case "the flow":  # it was compared with nothing
            releases.finish_version(registry, "4", gate_report("d"))
            (_, _, refused) = list_decisions(registry.root_uri, registry.name)[-3:]
            assert "version 1 became champion meanwhile" in refused.reason
        case _:
            text = "version 3 is not there any more, version 1 was champion before it"
            assert look_at(store_uri, registry, fix=False) == [
                ("wrong", f"champion of {registry.name}: {text}")
            ]
            (told,) = look_at(store_uri, registry, fix=True)
            assert told[0] == "mended"
            assert told[1].endswith("champion is version 1")
            assert look_at(store_uri, registry, fix=False) == []
    assert champion_of(registry) == "1"
    assert ("rolled_back", "3", "1") in events(registry)


@pytest.mark.parametrize(
    "moment", ["set_registered_model_alias", "update_model_version", "set_registered_model_tag"]
)
def test_of_two_promotions_at_once_the_later_one_on_record_holds(
    store_uri: str, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes before a step of the first, whose alias is then an old one."""
    registry = bare_registry(store_uri, f"at-once-{moment}", tmp_path)
    first, second = (add_version(registry, key) for key in "ab")
    step = getattr(MlflowClient, moment)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(MlflowClient, moment, step)
        releases.promote(registry, second, "the second")
        return step(*arguments, **options)

    monkeypatch.setattr(MlflowClient, moment, overtaken)
    releases.promote(registry, first, "the first")
    assert list_decisions(registry.root_uri, registry.name)[-1].champion == second
    assert champion_of(registry) == second
    assert (releases.settle(registry), releases.moved_alias(registry)) == ([], None)


def test_what_is_taken_down_becomes_champion_by_hand_alone(store_uri: str, tmp_path: Path) -> None:
    registry = bare_registry(store_uri, "by-hand", tmp_path)
    for key in "abc":
        releases.promote(registry, add_version(registry, key), "a reason")
    flagged = {"2": releases.TAKEDOWN_TAG, "4": releases.STARTED_FROM_TAG}
    registry.client.set_model_version_tag(registry.name, "2", flagged["2"], "a.mp4: on request")
    registry.client.delete_model_version(registry.name, "3")
    assert releases.settle(registry)[-1].champion == "1"  # it was the second before
    late = add_version(registry, "d")
    link = f"{releases.REGISTRY_SCHEME}{registry.name}/2"
    registry.client.set_model_version_tag(registry.name, late, flagged["4"], link)
    decision = releases.decide_by_gate(registry, late, gate_report("d"))
    assert (decision.event, champion_of(registry)) == ("refused", "1")
    assert "made of what is taken down (a.mp4: on request)" in decision.reason
    with pytest.raises(ConfigError, match=f"version {late} was made of what is taken down"):
        releases.promote(registry, late, " ")
    assert releases.promote(registry, late, "a reason") is not None


def test_a_decision_by_hand_begins_no_second_record(store_uri: str, tmp_path: Path) -> None:
    registry = bare_registry(store_uri, "one-record", tmp_path / "data")
    for key in "ab":
        releases.promote(registry, add_version(registry, key), "a reason")
    elsewhere = registry._replace(root_uri=str(tmp_path / "elsewhere"))
    for decide in (
        lambda: releases.promote(elsewhere, "1", "a reason"),
        lambda: releases.rollback(elsewhere, "a reason"),
    ):
        with pytest.raises(ConfigError, match=r"are on record beside .*set URSA_DATA_URI"):
            decide()
    assert champion_of(registry) == "2"
    shutil.copytree(tmp_path / "data", tmp_path / "copy")  # has the record too
    assert releases.rollback(registry._replace(root_uri=str(tmp_path / "copy")), None) is not None
    (tmp_path / "copy").rename(tmp_path / "gone")  # nothing is there to be forgotten
    assert releases.promote(elsewhere, "2", "a reason") is not None


def test_a_store_that_is_out_of_reach_stops_no_decision(
    store_uri: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(variable, "/gone")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    registry = bare_registry(store_uri, "retired-store", tmp_path)
    first, second = (add_version(registry, key) for key in "ab")
    releases.promote(registry, first, "a reason")
    last_uri = "s3://retired/releases/retired-store/000001.json"
    registry.client.set_registered_model_tag(registry.name, releases.LAST_TAG, last_uri)
    assert releases.promote(registry, second, "a reason") is not None
    assert f"the last decision about retired-store is not here: {last_uri}" in caplog.text


@pytest.mark.parametrize("mark", [releases.TAKEDOWN_TAG, releases.DAMAGED_TAG])
def test_a_pending_decision_on_what_is_marked_since_is_void(
    store_uri: str, tmp_path: Path, mark: str
) -> None:
    registry = bare_registry(store_uri, f"marked-{mark}", tmp_path)
    first, second = (add_version(registry, key) for key in "ab")
    releases.promote(registry, first, "a reason")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            releases.promote(registry, second, None)
    registry.client.set_model_version_tag(registry.name, second, mark, "what is wrong")
    assert releases.settle(registry) == []
    assert champion_of(registry) == first
    assert events(registry)[-1][0] == "voided"


def test_an_alias_that_a_person_took_off_stays_off(store_uri: str, tmp_path: Path) -> None:
    registry = bare_registry(store_uri, "taken-off", tmp_path)
    for key in "ab":
        releases.promote(registry, add_version(registry, key), "a reason")
    registry.client.delete_registered_model_alias(registry.name, "champion")
    assert releases.settle(registry) == []
    command = "`ursa models promote VERSION --name taken-off`"  # what is said can be typed
    with pytest.raises(ConfigError, match=f"taken-off has no champion; {command}"):
        releases.rollback(registry, None)
    assert releases.moved_alias(registry) == ("2", None)
    assert releases.record_move(registry) is not None
    registry.client.delete_model_version(registry.name, "2")
    assert releases.settle(registry) == []
    assert champion_of(registry) is None


def test_an_error_of_mlflow_hides_nothing_of_other_models(
    store_uri: str, tmp_path: Path, monkeypatch: Any
) -> None:
    broken, other = (bare_registry(store_uri, name, tmp_path) for name in ("a-broken", "b-other"))
    for registry in (broken, other):
        for key in "ab":
            releases.promote(registry, add_version(registry, key), "a reason")
    other.client.delete_model_version(other.name, "2")
    get = MlflowClient.get_registered_model

    def refused(self: Any, name: str) -> Any:
        if name == broken.name:
            raise MlflowException("a refusal")
        return get(self, name)

    monkeypatch.setattr(MlflowClient, "get_registered_model", refused)
    found = [item.text for item in Patient(store_uri, str(tmp_path), False, {}).leftovers()]
    assert any("a-broken could not be looked at: " in text for text in found)
    assert any("champion of b-other: version 2 is not there" in text for text in found)
