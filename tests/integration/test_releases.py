"""Champion, challenger and what is on record of them, with real models in a real MLflow store."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow.tracking import MlflowClient

from tasks import commands, doctor, evaluation, model_registry, registration, releases, tracking
from tasks.context import RunContext, TrainedModel
from tasks.doctor import Patient
from tests import factories, media
from tests.damage import noisy_model
from tests.registries import events, killed, run_ursa, store_uri
from ursa import storage
from ursa.artifacts import EvalReport, ExportedModel, ModelVersion
from ursa.decisions import list_decisions
from ursa.errors import ConfigError
from ursa.gate import not_compared
from ursa.training.stage import train_stage
from ursa.video.decode import video_info

__all__ = ["store_uri"]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # MLflow warns about its own imports
]
CHANGES = {
    "evaluation": {"max_samples": 12, "sampling": {"num_prompts": 1}},
    "release": {"gate_min_timestep": 0.9},
}


class Releases(NamedTuple):
    """A registry, and models to release."""

    context: RunContext
    trained: TrainedModel
    worse: ExportedModel
    good: ExportedModel

    @property
    def name(self) -> str:
        return self.context.config.release.model_name

    @property
    def uri(self) -> str:
        return self.context.run.tracking_uri

    @property
    def root(self) -> str:
        return self.context.data_uri

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    @property
    def champion(self) -> str | None:
        return releases.aliases(self.client, self.name).get("champion")

    def registry(self) -> releases.Registry:
        return releases.Registry(self.client, self.name, self.root, "a test")

    def release(self, model: ExportedModel) -> tuple[EvalReport, ModelVersion]:
        """Evaluate and register as the flow does."""
        report = evaluation.evaluate_model.fn(self.context, self.trained, model)
        return report, registration.register_model.fn(self.context, self.trained, report)

    def ursa(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line."""
        return run_ursa(self.registry(), self.uri, *arguments)


def export(data: factories.TinyData, output_uri: str, max_steps: int) -> Any:
    from ursa.release import export_model

    request = factories.stage_request(
        data, "video_pretrain", output_uri, max_steps=max_steps, config=CHANGES
    )
    checkpoint = train_stage(request)
    return request, checkpoint, export_model(request, checkpoint, output_uri=output_uri)


@pytest.fixture(scope="module")
def made(store_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Releases]:
    """Return a function that takes a name for a registered model."""
    data = factories.write_tiny_data(str(tmp_path_factory.mktemp("data")), num_validation=12)
    output_uri = str(tmp_path_factory.mktemp("models"))
    _, _, worse = export(data, output_uri, 30)
    request, checkpoint, good = export(data, output_uri, 90)
    frames = media.panning(30, step=2, height=48, width=64)
    folder = tmp_path_factory.mktemp("clips")
    path = media.save_video(folder / "a.mp4", frames, 12.0)
    clip = factories.clip_of(path, caption=factories.CAPTIONS[0], info=video_info(path))
    trained = TrainedModel(
        selection=factories.commit_selection(str(folder / "s"), [clip]),
        version_uri="",
        request=request,
        checkpoint=checkpoint,
    )

    def make(name: str) -> Releases:
        root = str(tmp_path_factory.mktemp(name))
        release = request.config.release.model_copy(update={"model_name": name})
        context = RunContext(
            source_uri="videos",
            data_uri=root,
            preset="tiny",
            config=request.config.model_copy(update={"release": release}),
            sources_uri="",
            source_fingerprint="s",
            start=None,
            fingerprint=name,
            run=tracking.open_run(store_uri, "run", name, {}, spool_uri=f"{root}/spool"),
        )
        return Releases(context, trained, worse, good)

    return make


def test_the_same_weights_under_two_names_are_two_models(made: Any) -> None:
    one, two = made("one"), made("two")
    for item in (one, two):
        _, version = item.release(item.worse)
        assert (version.version, version.alias) == ("1", "champion")
    versions = [item.client.get_model_version(item.name, "1") for item in (one, two)]
    ids = [model_registry.logged_model_id(version) for version in versions]
    assert len({one.client.get_logged_model(model_id).model_id for model_id in ids}) == 2
    assert doctor._missing(one.client, versions[0]) is None
    one.client.delete_logged_model(ids[0])
    assert doctor._missing(one.client, versions[0]) == "its logged model is gone"
    assert doctor._missing(two.client, versions[1]) is None


def test_promotion_refusal_and_rollback_are_on_record(made: Any, tmp_path: Path) -> None:
    opened = made("ursa")
    first, version = opened.release(opened.worse)
    assert (first.comparison, first.failed_gates, version.alias) == (None, (), "champion")
    assert {item.metric for item in first.intervals} == {
        f"{setting}{kind}" for setting in ("", "async_", "i2v_") for kind in ("loss", "accuracy")
    }

    better, version = opened.release(opened.good)
    assert better.comparison is not None
    assert better.comparison.champion_version == "1"
    assert better.metrics["eval/vs_champion_loss_high"] < 0
    assert (version.version, version.alias, opened.champion) == ("2", "champion", "2")

    damaged, version = opened.release(noisy_model(opened.good, tmp_path / "damaged", scale=0.05))
    assert any("worse than that of champion version 2" in text for text in damaged.failed_gates)
    assert (version.version, version.alias, opened.champion) == ("3", "challenger", "2")
    tags = opened.client.get_model_version(opened.name, "3").tags
    assert "worse than that of champion" in tags["ursa.failed_gates"]
    assert tags["ursa.comparison"].startswith("against champion version 2 on 12 samples")
    assert tags["ursa.decision"].startswith("refused by ")
    outcome = registration._title(opened.context, version)
    assert "version 3, which the gate refused (champion is still version 2): " in outcome
    assert "worse than that of champion version 2" in outcome

    with pytest.raises(ConfigError, match=r"the gate refused version 3: .* worse than"):
        releases.promote(opened.registry(), "3", None)
    with pytest.raises(ConfigError, match="say why it is to be champion all the same"):
        releases.promote(opened.registry(), "3", " ")
    done = opened.ursa("rollback", "--reason", "flickers")
    assert done.stdout == "champion is version 1, was 2\n", done.stderr
    assert opened.champion == "1"

    done = opened.ursa("history", "--json")
    records = json.loads(done.stdout)
    assert [(item["event"], item["version"], item["champion"]) for item in records] == [
        ("promoted", "1", "1"),
        ("promoted", "2", "2"),
        ("refused", "3", "2"),
        ("rolled_back", "2", "1"),
    ]
    assert records[3]["reason"] == "flickers"
    assert records[2]["report_uri"] == damaged.manifest_uri
    assert all(item["decided_by"] and item["decided_at"] for item in records)
    assert "flickers" in opened.ursa("history").stdout

    # the flow runs again: what is on record stays as it is, and what was left stays left
    opened.release(opened.good)
    again = evaluation.evaluate_model.fn(opened.context, opened.trained, opened.good)
    assert again.comparison is not None
    assert again.comparison.champion_version == "1"
    assert opened.champion == "1"
    assert len(list_decisions(opened.root, opened.name)) == 4

    listed = commands.list_models(tracking_uri=opened.uri, name=opened.name)
    assert [(item["version"], item["aliases"]) for item in listed] == [
        ("3", ["challenger"]),
        ("2", []),
        ("1", ["champion"]),
    ]


def with_release(opened: Releases, **changes: Any) -> Releases:
    """The same registry, for runs of another configuration."""
    context = opened.context
    release = context.config.release.model_copy(update=changes)
    config = context.config.model_copy(update={"release": release})
    key = f"{context.fingerprint}{sorted(changes)}"
    changed = context.model_copy(update={"config": config, "fingerprint": key})
    return opened._replace(context=changed)


def test_of_two_registrations_at_once_the_second_is_told_of_the_first(
    made: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    opened = made("at-once")
    opened.release(noisy_model(opened.worse, tmp_path / "first", scale=0.3))
    better, worse = (
        evaluation.evaluate_model.fn(opened.context, opened.trained, model)
        for model in (opened.good, opened.worse)
    )
    assert better.gate_passed
    assert worse.gate_passed
    obstacle, calls = releases._obstacle, []

    def slow(registry: Any, version: str, report: EvalReport) -> str | None:
        found = obstacle(registry, version, report)
        calls.append(report.model.content_key)
        if len(calls) == 1:
            registration.register_model.fn(opened.context, opened.trained, better)
        return found

    monkeypatch.setattr(releases, "_obstacle", slow)
    version = registration.register_model.fn(opened.context, opened.trained, worse)
    champion = opened.client.get_model_version(opened.name, str(opened.champion))
    assert champion.tags["ursa.registration_key"] == opened.good.content_key
    assert version.alias != "champion"
    last = list_decisions(opened.root, opened.name)[-1]
    assert (last.event, last.champion) == ("refused", opened.champion)
    assert "became champion meanwhile" in last.reason


def test_a_kill_while_a_version_is_described_anew_is_made_good(made: Any, monkeypatch: Any) -> None:
    opened = made("described")
    opened.release(opened.good)
    refused, _ = opened.release(opened.worse)
    assert not refused.gate_passed
    loose = with_release(opened, budgets={"loss": 9.0})
    set_tag = MlflowClient.set_model_version_tag

    def killed(self: Any, name: str, version: str, key: str, value: Any) -> None:
        set_tag(self, name, version, key, value)
        if key == "ursa.preset":  # some are written, others are not
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", killed)
        with pytest.raises(KeyboardInterrupt):
            loose.release(loose.worse)
    tracking.tag_run(loose.context.run, {registration.IS_NEW_TAG: "true"})
    assert registration.find_version.fn(loose.context) is None
    loose.release(loose.worse)
    tags = opened.client.get_model_version(opened.name, "2").tags
    assert (tags["ursa.gate_passed"], tags["ursa.failed_gates"]) == ("true", "")
    found = registration.find_version.fn(loose.context)
    assert found is not None
    assert (found.version, found.alias) == ("2", "champion")


def test_a_run_that_was_not_finished_is_no_version_to_find(made: Any) -> None:
    """Card and report come after the registration."""
    opened = made("unfinished")
    opened.release(opened.good)
    assert registration.find_version.fn(opened.context) is None
    tracking.tag_run(opened.context.run, {registration.IS_NEW_TAG: "true"})
    assert registration.find_version.fn(opened.context) is not None


def test_a_champion_that_others_registered(made: Any) -> None:
    for name, is_required in (("foreign-required", True), ("foreign", False)):
        opened = with_release(made(name), require_comparison=is_required)
        opened.client.create_registered_model(opened.name)
        opened.client.create_model_version(opened.name, "/somewhere")
        opened.client.set_registered_model_alias(opened.name, "champion", "1")
        report, _ = opened.release(opened.good)
        assert report.comparison is not None
        assert report.comparison.problem == "it was not registered by this pipeline"
        assert opened.champion == ("1" if is_required else "2")


def test_a_champion_under_another_number_is_the_same(made: Any, tmp_path: Path) -> None:
    opened = made("renumbered")
    opened.release(opened.worse)
    evaluation.evaluate_model.fn(opened.context, opened.trained, opened.good)
    opened.client.delete_registered_model(opened.name)
    opened.release(noisy_model(opened.worse, tmp_path / "bad", scale=0.3))
    opened.release(opened.worse)
    assert opened.champion == "2"
    report, version = opened.release(opened.good)
    assert report.comparison is not None
    assert (report.comparison.champion_version, version.alias) == ("2", "champion")


def test_versions_of_what_is_taken_down_are_marked(made: Any) -> None:
    opened = made("taken")
    for model in (opened.worse, opened.good):
        opened.release(model)
    found = commands.flag_versions(
        tracking_uri=opened.uri,
        directories=[opened.worse.directory_uri],
        text="file:///v/a.mp4: on request",
    )
    marked = {"name": "taken", "version": "1", "aliases": []}
    assert {**marked, "directory": opened.worse.directory_uri} in found
    assert ("taken", "2") not in {(item["name"], item["version"]) for item in found}
    listed = opened.ursa("list")
    assert "TAKEN DOWN: file:///v/a.mp4: on request" in listed.stdout, listed.stderr
    done = opened.ursa("promote", "1")
    assert "version 1 was made of what is taken down" in done.stderr
    assert opened.champion == "2"
    done = opened.ursa("rollback")
    assert "version 1 was made of what is taken down" in done.stderr
    assert opened.champion == "2"
    assert "champion is version 1" in opened.ursa("rollback", "--reason", "a test").stdout
    assert "champion is version 2" in opened.ursa("promote", "2").stdout
    assert "champion is version 1" in opened.ursa("promote", "1", "--reason", "a test").stdout


def test_a_decision_that_a_kill_interrupted_is_finished_once(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the record, at each of the three calls that follow it."""
    opened = made("killed")
    for model in (opened.worse, opened.good):
        opened.release(model)
    for stop in ("set_registered_model_alias", "set_model_version_tag", "set_registered_model_tag"):
        champion = opened.champion

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, stop, killed)
            with pytest.raises(KeyboardInterrupt):
                releases.rollback(opened.registry(), stop)
        count = len(list_decisions(opened.root, opened.name))
        decision = releases.rollback(opened.registry(), "again")
        assert (decision.reason, decision.champion) == (stop, "1")
        assert (champion, opened.champion) == ("2", "1")
        assert len(list_decisions(opened.root, opened.name)) == count
        releases.promote(opened.registry(), "2", "back")

    # an alias that a person moves in MLflow is where the next rollback begins
    opened.client.set_registered_model_alias(opened.name, "champion", "1")
    assert releases.moved_alias(opened.registry()) == ("2", "1")
    assert releases.rollback(opened.registry(), None).champion == "2"
    assert releases.moved_alias(opened.registry()) is None
    opened.client.set_registered_model_alias(opened.name, "champion", "1")
    moved = releases.record_move(opened.registry())
    assert moved is not None
    assert (moved.event, moved.champion_before, moved.champion) == ("moved", "2", "1")
    assert releases.record_move(opened.registry()) is None


def test_decisions_of_a_registry_that_is_gone_say_nothing_of_this_one(made: Any) -> None:
    opened = made("emptied")
    opened.release(opened.worse)
    opened.client.delete_registered_model(opened.name)
    report, version = opened.release(opened.good)  # is version 1 again
    assert (report.comparison, version.version, opened.champion) == (None, "1", "1")
    assert [item.event for item in list_decisions(opened.root, opened.name)] == ["promoted"] * 2
    registry = opened.registry()
    with pytest.raises(ConfigError, match="no champion before version 1 is on record"):
        releases.rollback(registry, None)
    with pytest.raises(ConfigError, match="no whole version 9"):
        releases.promote(registry, "9", None)
    assert releases.promote(registry, "1", None) is None


KILLED = """
import json, os, signal, sys
import mlflow.pyfunc
from mlflow.tracking import MlflowClient
from tasks import model_registry, registration, releases, tracking
from tasks.context import RunContext, TrainedModel
from ursa.artifacts import EvalReport

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

given = json.load(sys.stdin)
context = RunContext.model_validate(given["context"])
trained = TrainedModel.model_validate(given["trained"])
owners = {"client": MlflowClient, "model_registry": model_registry, "releases": releases}
for (owner, name), report in zip(given["moments"], given["reports"]):
    child = os.fork()  # before the parent has opened a database
    if child == 0:
        setattr(owners[owner], name, die)
        run = context.run
        tracking.open_run(run.tracking_uri, "run", context.fingerprint, {}, spool_uri=run.spool_uri)
        with tracking.child_run(context.run, f"register {name}", {}):
            registration.register_model.fn(context, trained, EvalReport.model_validate(report))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""
MOMENTS = (
    ("client", "finalize_logged_model"),  # a model that is PENDING
    ("model_registry", "verify_files"),  # a model without a version
    ("releases", "finish_version"),  # a version without aliases
    ("releases", "_carry_out"),  # a decision on record, the alias where it was
)


@pytest.mark.slow
def test_what_a_kill_amid_registration_leaves_is_mended(made: Any, tmp_path: Path) -> None:
    opened = made("doctor")
    report, _ = opened.release(opened.good)
    reports = []
    for number in range(len(MOMENTS)):
        model = noisy_model(opened.good, tmp_path / str(number), scale=1e-6 * (1 + number))
        uri = str(tmp_path / f"{number}.json")
        changes = {
            "model": model,
            "manifest_uri": uri,
            "fingerprint": str(number),
            "comparison": not_compared("1", "a test"),
        }
        reports.append(storage.commit_record(uri, report.model_copy(update=changes)))
    given = {
        "context": opened.context.model_dump(mode="json"),
        "trained": opened.trained.model_dump(mode="json"),
        "moments": MOMENTS,
        "reports": [item.model_dump(mode="json") for item in reports],
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    def look(*, fix: bool) -> list[tuple[str, str]]:
        found = Patient(opened.uri, opened.root, fix, {}).leftovers()
        return [(item.state, item.text) for item in found if item.state != "note"]

    def count(found: list[tuple[str, str]], state: str, words: str) -> int:
        return sum(item[0] == state and words in item[1] for item in found)

    before = (opened.champion, len(list_decisions(opened.root, opened.name)))
    found = look(fix=False)
    assert count(found, "wrong", "is RUNNING, but its process") == 1 + len(MOMENTS)
    assert count(found, "wrong", "no version is of it") == 2
    assert count(found, "wrong", "PENDING") == 1
    assert count(found, "wrong", "is half registered") == 2
    assert count(found, "wrong", "was not carried out") == 1
    assert (opened.champion, len(list_decisions(opened.root, opened.name))) == before

    mended = look(fix=True)
    assert not [item for item in mended if item[0] == "wrong"]
    assert look(fix=False) == [("ok", "no run, model, version or alias is left over")]
    assert opened.champion == "3"
    decisions = list_decisions(opened.root, opened.name)
    assert [(item.event, item.version) for item in decisions] == [
        ("promoted", "1"),
        ("promoted", "3"),
        ("refused", "2"),  # it was never compared with the third, which is champion now
    ]
    assert "version 3 became champion meanwhile" in decisions[2].reason
    assert set(releases.whole_versions(opened.registry())) == {"1", "2", "3"}
    # the others are registered by the next try
    version = registration.register_model.fn(opened.context, opened.trained, reports[0])
    assert (version.version, version.is_new) == ("4", True)


def test_an_alias_of_a_version_without_its_files_goes_back(made: Any) -> None:
    opened = made("broken")
    for model in (opened.worse, opened.good):
        opened.release(model)
    version = opened.client.get_model_version(opened.name, "2")
    model_id = version.source.rpartition("/")[2]
    stored = opened.client.get_logged_model(model_id).artifact_location
    next(storage.local_path(stored).rglob("*.safetensors")).unlink()
    opened.client.set_tag(opened.context.run.run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    patient = Patient(opened.uri, opened.root, fix=True, marks={})
    texts = [item.text for item in patient.leftovers() if opened.name in item.text]
    assert any("1 of its files are gone" in text and "rolled back" in text for text in texts)
    assert (opened.champion, releases.aliases(opened.client, opened.name)["challenger"]) == (
        "1",
        "1",
    )
    listed = opened.ursa("list").stdout
    assert "DAMAGED: 1 of its files are gone" in listed
    with pytest.raises(ConfigError, match="no whole version 2"):
        releases.promote(opened.registry(), "2", None)
    found = [item for item in patient.leftovers() if opened.name in item.text]
    assert [item.state for item in found] == ["note"]
    assert "was damaged, and still 1 of its files are gone" in found[0].text
    _, version = opened.release(opened.good)  # not up to date: registered anew
    assert (version.version, version.alias) == ("3", "champion")
    (note,) = (item for item in patient.leftovers() if "was damaged" in item.text)
    assert note.text.endswith("; version 3 is the same model")


def test_a_store_of_files_that_is_away_costs_no_version(made: Any, store_uri: str) -> None:
    opened = made("files-away")
    for model in (opened.worse, opened.good):
        opened.release(model)
    opened.client.set_tag(opened.context.run.run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    patient = Patient(opened.uri, opened.root, fix=True, marks={})
    before = releases.aliases(opened.client, opened.name), events(opened.registry())
    files = Path(store_uri.removeprefix("sqlite:///")).parent / "files"
    files.rename(files.with_name("unmounted"))
    try:
        for _ in range(3):
            found = [item for item in patient.leftovers() if opened.name in item.text]
            assert {item.state for item in found} == {"wrong"}
            assert "is the store of MLflow's files away?" in found[0].text
    finally:
        shutil.rmtree(files, ignore_errors=True)
        files.with_name("unmounted").rename(files)
    assert not [item for item in patient.leftovers() if opened.name in item.text]
    assert (releases.aliases(opened.client, opened.name), events(opened.registry())) == before
    assert list(releases.whole_versions(opened.registry())) == ["2", "1"]


def test_files_that_are_back_make_a_version_whole_again(made: Any) -> None:
    opened = made("back")
    for model in (opened.worse, opened.good):
        opened.release(model)
    model_id = opened.client.get_model_version(opened.name, "2").source.rpartition("/")[2]
    stored = storage.local_path(opened.client.get_logged_model(model_id).artifact_location)
    opened.client.set_tag(opened.context.run.run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    patient = Patient(opened.uri, opened.root, fix=True, marks={})
    stored.rename(stored.with_name("elsewhere"))
    report_uri = opened.client.get_model_version(opened.name, "1").tags["ursa.evaluation"]
    unknown = Path(report_uri).rename(f"{report_uri}.away")  # whether version 1 is any better
    found = [item for item in patient.leftovers() if opened.name in item.text]
    assert {item.state for item in found} == {"wrong"}
    assert opened.champion == "2"
    unknown.rename(report_uri)
    texts = [item.text for item in patient.leftovers() if opened.name in item.text]
    assert any("all of its files are gone: rolled back to version 1" in text for text in texts)
    shutil.copytree(stored.with_name("elsewhere"), stored)
    weights = next(stored.rglob("*.safetensors"))
    weights.write_bytes(b"")
    (note,) = (item for item in patient.leftovers() if opened.name in item.text)
    assert (note.state, f"{weights.name} is missing or differs" in note.text) == ("note", True)
    shutil.rmtree(stored)
    stored.with_name("elsewhere").rename(stored)
    found = [item for item in patient.leftovers() if opened.name in item.text]
    assert [(item.state, "its files are back" in item.text) for item in found] == [("mended", True)]
    assert list(releases.whole_versions(opened.registry())) == ["2", "1"]
    assert releases.promote(opened.registry(), "2", None) is not None


def test_a_damaged_champion_with_none_before_it_gives_way(made: Any) -> None:
    opened = made("the-only-one")
    opened.release(opened.good)
    model_id = opened.client.get_model_version(opened.name, "1").source.rpartition("/")[2]
    stored = opened.client.get_logged_model(model_id).artifact_location
    next(storage.local_path(stored).rglob("*.safetensors")).unlink()
    opened.client.set_tag(opened.context.run.run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    patient = Patient(opened.uri, opened.root, fix=True, marks={})
    texts = [item.text for item in patient.leftovers() if opened.name in item.text]
    assert any("no champion before version 1 is on record" in text for text in texts)
    _, version = opened.release(opened.good)
    assert (version.version, version.alias, opened.champion) == ("2", "champion", "2")


def test_a_version_that_is_finished_late_is_not_the_challenger(made: Any) -> None:
    opened = made("late")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releases, "finish_version", killed)
        with pytest.raises(KeyboardInterrupt):
            opened.release(opened.worse)
    opened.release(opened.good)
    opened.client.set_terminated(opened.context.run.run_id, "KILLED")
    opened.client.set_tag(opened.context.run.run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    list(Patient(opened.uri, opened.root, fix=True, marks={}).leftovers())
    assert list(releases.whole_versions(opened.registry())) == ["2", "1"]
    found = releases.aliases(opened.client, opened.name)
    assert found == {"challenger": "2", "champion": "2"}


def test_a_store_that_is_away_hides_nothing_of_other_models(made: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", "/gone")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/gone")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    away, here = made("a-store-is-away"), made("half")
    for item in (away, here):
        item.release(item.good)
        item.client.delete_model_version_tag(item.name, "1", releases.WHOLE_TAG)
        run_id = item.context.run.run_id
        item.client.set_tag(run_id, "ursa.process", f"{socket.gethostname()}:1:0")
    away.client.set_model_version_tag(away.name, "1", "ursa.evaluation", "s3://gone/manifest.json")
    found = list(Patient(here.uri, here.root, fix=True, marks={}).leftovers())
    states = {
        item.name: [(one.state, one.text) for one in found if item.name in one.text]
        for item in (away, here)
    }
    assert any(
        state == "wrong" and "could not be looked at: s3://gone/manifest.json" in text
        for state, text in states[away.name]
    )
    assert ("mended", "version 1 of half is half registered: its files are whole; finished") in (
        states[here.name]
    )
    assert list(releases.whole_versions(here.registry())) == ["1"]


def test_a_run_that_is_under_way_is_left_alone(made: Any) -> None:
    opened = made("alive")  # its run is RUNNING, and its process is this one
    with tracking.child_run(opened.context.run, "evaluate", {}) as run:
        list(Patient(opened.uri, opened.root, fix=True, marks={}).leftovers())
        assert opened.client.get_run(run.run_id).info.status == "RUNNING"
        assert opened.client.get_run(opened.context.run.run_id).info.status == "RUNNING"
