"""`ursa doctor`: find what a kill has left in MLflow and Prefect, and mend it.

What is under way is never touched: a tracking run names its process (`ursa.process`), and only one
of this machine that is gone counts as dead. A flow run is dead if its tracking run says so, or if
its server is that of `make up` here, whose runs are on this machine, and no process is its own.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from tasks import model_registry, releases, tracking
from tasks.machine import (
    ANSWER_LIMIT_S,
    Finding,
    check_checkpoints,
    check_installation,
    check_room,
    check_security,
    check_service,
    is_embedded,
)
from tasks.model_registry import ALL_GONE
from tasks.processes import flow_run_ids, process_lives
from ursa import storage
from ursa.artifacts import EvalReport
from ursa.decisions import who
from ursa.errors import ConfigError, DataError, RegistrationError, UrsaError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MIN_AGE_S = 60.0
"""A flow run changes its state before its process can be seen."""
_FIX = "ursa doctor --fix"
_AWAY = "is the store of MLflow's files away?"
_LEFT = "nothing is changed; delete the versions in MLflow if the files are lost"
_UNDER_WAY = ("RUNNING", "PENDING", "CANCELLING")
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def examine(
    *, tracking_uri: str, prefect_url: str, root_uri: str, fix: bool, security: bool
) -> list[Finding]:
    """Check everything.

    Args:
        tracking_uri: Address of the tracking server.
        prefect_url: Address of the Prefect server, without "/api".
        root_uri: The data root.
        fix: Whether what can be mended is mended.
        security: Whether ports and passwords are looked at too.

    Returns:
        What was found, area by area.
    """
    found = [*check_installation(), *check_room(root_uri), *check_checkpoints(root_uri, fix=fix)]
    mlflow = check_service("mlflow", tracking_uri, "/health")
    prefect = check_service("prefect", prefect_url, "/api/health")
    found += [mlflow, prefect]
    marks: dict[str, str] | None = None
    if mlflow.state != "wrong":
        patient = Patient(tracking_uri, root_uri, fix, {})
        try:
            found += patient.leftovers()
            marks = patient.marks
        except UrsaError as error:
            found.append(Finding("MLflow", "wrong", f"could not be looked at: {error}"))
    if prefect.state == "ok":
        found += _safely("Prefect", check_flow_runs(prefect_url, marks, fix=fix))
    if security:
        found += check_security(tracking_uri, prefect_url)
    return found


class Patient(NamedTuple):
    """The tracking server and the registry, and whether they are mended.

    Attributes:
        tracking_uri: Address of the tracking server.
        root_uri: The data root.
        fix: Whether they are.
        marks: Filled: of each flow run the mark of its process.
    """

    tracking_uri: str
    root_uri: str
    fix: bool
    marks: dict[str, str]

    def leftovers(self) -> Iterator[Finding]:
        """Look at runs, logged models, versions, aliases and decisions.

        Yields:
            What is left of runs whose process is gone; one line if nothing is.

        Raises:
            ServiceError: If the server does not answer.
            UrsaError: If a record cannot be read.
        """
        with tracking.service(self.tracking_uri) as client:
            experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
            if experiment is None:
                yield Finding("MLflow", "ok", "no run yet")
                return
            living: set[str] = set()
            found = [*self._runs(client, experiment.experiment_id, living)]
            everything = list(client.search_model_versions())
            models = {
                model.model_id: model
                for model in model_registry.logged_models(client, experiment.experiment_id)
                if "ursa.registration_key" in model.tags
            }
            used = {model_registry.logged_model_id(version) for version in everything}
            # what cannot be read of one thing hides nothing of the others
            for model_id, model in models.items():
                if model_id not in used and model.source_run_id not in living:
                    found += self._safely(self._model(client, model), f"model {model_id} ")
            versions = [item for item in everything if "ursa.registration_key" in item.tags]
            busy = {item.name for item in versions if item.run_id in living}
            for version in sorted(versions, key=lambda item: int(item.version)):
                if version.name in busy:
                    continue
                what = f"version {version.version} of {version.name} "
                if releases.WHOLE_TAG not in version.tags:
                    model = models.get(model_registry.logged_model_id(version))
                    found += self._safely(self._version(client, version, model), what)
                elif releases.DAMAGED_TAG in version.tags:
                    found += self._safely(self._damaged(client, version), what)
            for name in sorted({item.name for item in versions} - busy):
                registry = releases.Registry(client, name, self.root_uri, f"ursa doctor of {who()}")
                look = itertools.chain(self._aliases(registry), self._decisions(registry))
                found += self._safely(look, f"{name} ")
            yield from found
            if not any(item.state == "wrong" for item in found):
                yield Finding("MLflow", "ok", "no run, model, version or alias is left over")

    def _safely(self, findings: Iterable[Finding], what: str) -> Iterator[Finding]:
        def with_named_errors() -> Iterator[Finding]:
            with tracking.service(self.tracking_uri):
                yield from findings

        return _safely("MLflow", with_named_errors(), what)

    def _wrong(self, text: str, done: str) -> Finding:
        """Return a problem that can be mended, as mended if it is."""
        if self.fix:
            return Finding("MLflow", "mended", f"{text}: {done}")
        return Finding("MLflow", "wrong", text, _FIX)

    def _runs(
        self, client: "MlflowClient", experiment_id: str, living: set[str]
    ) -> Iterator[Finding]:
        """Close the runs whose process is gone; add the ids of others to `living`."""
        for run in client.search_runs([experiment_id], max_results=50_000):
            tags, mark = run.data.tags, run.data.tags.get("ursa.process")
            if mark and "prefect.last_flow_run_id" in tags:
                self.marks.setdefault(tags["prefect.last_flow_run_id"], mark)
            lives = process_lives(mark)
            if lives:
                living.add(run.info.run_id)
            if lives or run.info.status != "RUNNING":
                continue
            text = f"run {run.info.run_name} ({run.info.run_id}) is RUNNING"
            if lives is False:
                if self.fix:
                    client.set_terminated(run.info.run_id, "KILLED")
                yield self._wrong(f"{text}, but its process {mark} is gone", "closed as KILLED")
                continue
            living.add(run.info.run_id)
            where = f"its process {mark} is of another machine" if mark else "by what, no tag says"
            yield Finding("MLflow", "note", f"{text}; {where}, so it is left alone")

    def _model(self, client: "MlflowClient", model: Any) -> Iterator[Finding]:
        """Delete a model that no version is of and no living run makes."""
        if self.fix:
            client.delete_logged_model(model.model_id)
        text = f"model {model.model_id} is {model.status} and no version is of it"
        yield self._wrong(text, "deleted; the next run registers it again")

    def _version(self, client: "MlflowClient", version: Any, model: Any) -> Iterator[Finding]:
        """Finish a version that has not got its aliases, or delete it if it is damaged."""
        text = f"version {version.version} of {version.name} is half registered"
        if not self.fix:
            yield self._wrong(text, "")
            return
        try:
            report = storage.load_record(version.tags.get("ursa.evaluation", ""), EvalReport)
            if report is None or model is None:
                gone = "model" if model is None else "evaluation"
                raise RegistrationError(f"its {gone} is gone")  # noqa: TRY301
            if model_registry.missing_files(client, model.model_id, report.model) == ALL_GONE:
                yield Finding("MLflow", "wrong", f"{text}, and {ALL_GONE}: {_AWAY}", _LEFT)
                return
            model_registry.verify_files(self.tracking_uri, version.source, report.model)
        except (DataError, RegistrationError) as error:
            client.delete_model_version(version.name, str(version.version))
            yield self._wrong(text, f"{error}; deleted, the next run registers it again")
            return
        except UrsaError as error:
            yield Finding("MLflow", "wrong", f"{text} and could not be looked at: {error}")
            return
        decided_by = f"ursa doctor of {who()}"
        registry = releases.Registry(client, version.name, self.root_uri, decided_by)
        releases.finish_version(registry, str(version.version), report)
        yield self._wrong(text, "its files are whole; finished")

    def _damaged(self, client: "MlflowClient", version: Any) -> Iterator[Finding]:
        """Trust a version again whose files are back; champion is what the record says."""
        text = f"version {version.version} of {version.name} was damaged"
        again = "the next run of its data registers it anew"
        registry = releases.Registry(client, version.name, self.root_uri, "")
        for number, other in releases.whole_versions(registry).items():
            if other.tags.get("ursa.registration_key") == version.tags["ursa.registration_key"]:
                again = f"version {number} is the same model"
        report = _report(version)
        if report is None:
            yield Finding("MLflow", "note", f"{text}; its evaluation is not here to tell; {again}")
            return
        problem = _missing(client, version)
        if problem is None:  # names are there: what is in them?
            try:
                model_registry.verify_files(self.tracking_uri, version.source, report.model)
            except RegistrationError as error:
                problem = str(error)
        if problem is not None:
            yield Finding("MLflow", "note", f"{text}, and still {problem}; {again}")
            return
        if self.fix:
            client.delete_model_version_tag(
                version.name, str(version.version), releases.DAMAGED_TAG
            )
        yield self._wrong(f"{text}, and its files are back", "it is whole again")

    def _aliases(self, registry: releases.Registry) -> Iterator[Finding]:
        """Take aliases off versions that are not whole; nothing where all versions lack files."""
        versions = {str(item.version): item for item in releases.all_versions(registry)}
        for alias, number in releases.aliases(registry.client, registry.name).items():
            problem = _missing(registry.client, versions.get(number))
            if problem is None:
                continue
            usable = {
                other: version
                for other, version in releases.whole_versions(registry).items()
                # of what no record says what belongs to it, nothing is known
                if other != number
                and _report(version) is not None
                and _missing(registry.client, version) is None
            }
            text = f"alias {alias} of {registry.name} names version {number}: {problem}"
            if problem == ALL_GONE and not usable:
                yield Finding(
                    "MLflow", "wrong", f"{text}, and of all other versions: {_AWAY}", _LEFT
                )
                continue
            if not self.fix:
                yield self._wrong(text, "")
                continue
            if releases.WHOLE_TAG in getattr(versions.get(number), "tags", {}):
                registry.client.set_model_version_tag(
                    registry.name, number, releases.DAMAGED_TAG, problem
                )
            yield self._take_off(registry, alias, text, usable)

    def _take_off(
        self, registry: releases.Registry, alias: str, text: str, usable: Mapping[str, Any]
    ) -> Finding:
        """Give an alias to another version, the newest first."""
        if alias == releases.CHAMPION:
            kept = {
                number
                for number, version in usable.items()
                if releases.taken_down(registry.client, version) is None
            }
            try:
                decision = releases.rollback(registry, text, among=kept)
            except ConfigError as error:
                return Finding("MLflow", "wrong", f"{text}; {error}")
            return self._wrong(text, f"rolled back to version {decision.champion}")
        newest = next(iter(usable), None)
        if newest is None:
            registry.client.delete_registered_model_alias(registry.name, alias)
            return self._wrong(text, "taken off")
        registry.client.set_registered_model_alias(registry.name, alias, newest)
        return self._wrong(text, f"moved to version {newest}")

    def _decisions(self, registry: releases.Registry) -> Iterator[Finding]:
        """Carry out decisions that a kill interrupted, restore a champion, note a moved alias."""
        pending = {
            decision.number: (decision, releases.void(registry, decision))
            for decision in releases.pending_decisions(registry)
            if decision.event != "voided"  # the next settles it; it changes nothing
        }
        done = releases.settle(registry) if self.fix else []
        for decision, problem in pending.values():
            text = f"decision {decision.number} on {registry.name} ({decision.event} version "
            text += f"{decision.version}) was not carried out"
            if problem is None:
                yield self._wrong(text, f"champion is version {decision.champion}")
            else:
                yield self._wrong(f"{text}: {problem}", "passed over, which is on record now")
        if pending and not self.fix:
            return
        for decision in done:
            if decision.number not in pending:
                text = f"champion of {registry.name}: {decision.reason}"
                yield self._wrong(text, f"champion is version {decision.champion}")
        lost = releases.lost_champion(registry)
        if lost is not None:
            gone, target = lost
            text = f"champion of {registry.name}: version {gone} is not there any more, version "
            yield self._wrong(f"{text}{target} was champion before it", "")
            return
        moved = releases.moved_alias(registry)
        if moved is not None:
            if self.fix:
                releases.record_move(registry)
            text = f"champion of {registry.name} was moved from version {moved[0]} to {moved[1]}"
            on_record = "; it is on record now" if self.fix else f"; {_FIX} puts it on record"
            yield Finding("MLflow", "note", f"{text} without `ursa models`{on_record}")


def _safely(area: str, findings: Iterable[Finding], what: str = "") -> Iterator[Finding]:
    """Yield findings; an error among them is one too, of what stands in `what`."""
    try:
        yield from findings
    except (UrsaError, httpx.HTTPError) as error:
        yield Finding(area, "wrong", f"{what}could not be looked at: {error}")


def _missing(client: "MlflowClient", version: Any) -> str | None:
    """Return what a version lacks that an alias names; None if nothing."""
    if version is None:
        return "there is no such version"
    if "ursa.registration_key" not in version.tags:
        return None  # not ours
    if releases.WHOLE_TAG not in version.tags:
        return "it is not whole"
    if version.status != "READY":
        return f"it is {version.status}"
    report = _report(version)
    if report is None:
        return None  # the data root is elsewhere: nothing to compare with
    return model_registry.missing_files(
        client, model_registry.logged_model_id(version), report.model
    )


def _report(version: Any) -> EvalReport | None:
    """Return the evaluation of a version, which names its files; None if it is not here."""
    uri = version.tags.get("ursa.evaluation")
    return storage.load_record(uri, EvalReport) if uri else None


def check_flow_runs(
    prefect_url: str, marks: Mapping[str, str] | None, *, fix: bool, min_age_s: float = MIN_AGE_S
) -> Iterator[Finding]:
    """Look for flow runs that are said to be under way and have no process.

    Args:
        prefect_url: Address of the server.
        marks: Of flow runs the mark of their process, where it is known; None if MLflow, which
            has them, cannot be read.
        fix: Whether they are set to Crashed.
        min_age_s: Younger states are left alone, seconds.

    Yields:
        One line a dead run, or one that there is none, and one of each that may live elsewhere.

    Raises:
        HTTPError: If the server does not answer.
    """
    living, is_local, known = flow_run_ids(), is_embedded(prefect_url), marks or {}
    headers = {}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    auth = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    found: list[Finding] = []
    left: list[Finding] = []
    with httpx.Client(
        base_url=f"{prefect_url.rstrip('/')}/api",
        headers=headers,
        auth=(auth[0], auth[2]) if auth[0] else None,
        timeout=ANSWER_LIMIT_S,
        trust_env=False,
    ) as client:
        query = {"flow_runs": {"state": {"type": {"any_": _UNDER_WAY}}}}
        runs = _answer(client.post("/flow_runs/filter", json=query))
        for run in sorted(runs, key=lambda item: item["parent_task_run_id"] is not None):
            if _age_s(run) < min_age_s:
                continue
            why = _death(client, run, living, known, is_local=is_local)
            text = f"flow run {run['name']} ({run['id']}) is {run['state']['name']}"
            if why is None:
                if run["id"] not in living and not process_lives(known.get(run["id"])):
                    unread = ", as MLflow cannot be read" if marks is None else ""
                    text += f"; its process is not known here{unread}, so it is left alone"
                    left.append(Finding("Prefect", "note", text))
                continue
            text += f": {why}"
            if fix:
                state = {"type": "CRASHED", "name": "Crashed", "message": f"ursa doctor: {why}"}
                change = {"state": state, "force": True}
                _answer(client.post(f"/flow_runs/{run['id']}/set_state", json=change))
                found.append(Finding("Prefect", "mended", f"{text}; crashed it"))
            else:
                found.append(Finding("Prefect", "wrong", text, _FIX))
    yield from (*found, *left)
    if not found:
        yield Finding("Prefect", "ok", "no flow run is left over")


def _death(
    client: httpx.Client,
    run: dict[str, Any],
    living: set[str],
    marks: Mapping[str, str],
    *,
    is_local: bool,
) -> str | None:
    """Return why a flow run is dead; None if it lives, or that cannot be known here."""
    if run["parent_task_run_id"] is not None:
        task = _answer(client.get(f"/task_runs/{run['parent_task_run_id']}"))
        parent = _answer(client.get(f"/flow_runs/{task['flow_run_id']}"))
        is_over = parent["state"]["type"] in _ENDED
        why = None if is_over else _death(client, parent, living, marks, is_local=is_local)
        return "the run around it has ended" if is_over else why
    if run["id"] in living:
        return None
    if run["id"] in marks:
        return "its process is gone" if process_lives(marks[run["id"]]) is False else None
    # the server of `make up` has workers on this machine alone
    if is_local and run["deployment_id"] is not None:
        return "it has no process on this machine"
    return None


def _answer(response: httpx.Response) -> Any:
    response.raise_for_status()
    return response.json()


def _age_s(run: dict[str, Any]) -> float:
    stamp = run["state"]["timestamp"].replace("Z", "+00:00")
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
