"""Who is champion: promotion by the gate or by a person, rollback; every decision is on record.

A decision is committed in the data root first (`ursa.decisions`) and then carried out: the alias,
and last the tag `ursa.last_decision` of the registered model. So whatever a kill has left undone is
known, and the next decision, or `ursa doctor --fix`, finishes it. Numbers are not enough to know a
version by: a registry that is restored from an older copy gives them again. A decision names the
models too, and one whose model is gone is void. The client is MLflow's, from
`tasks.tracking.service`.
"""

import contextlib
import logging
import shlex
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ursa import storage
from ursa.artifacts import EvalReport
from ursa.config import fingerprint
from ursa.decisions import (
    Decision,
    Event,
    OvertakenError,
    earlier_champions,
    list_decisions,
    newest_number,
    record_decision,
    standing,
)
from ursa.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

UNNAMED = "ursa"
"""The registered model that `ursa models` means where no name is given."""
CHAMPION = "champion"
CHALLENGER = "challenger"
WHOLE_TAG = "ursa.aliased"
"""Of a version that was registered to the end."""
TAKEDOWN_TAG = "ursa.takedown"
"""Of a version: sources that it was made of and that were taken down since, one a line."""
DAMAGED_TAG = "ursa.damaged"
"""Of a version that was registered to the end: what it lacks since, as `ursa doctor` saw it."""
STARTED_FROM_TAG = "ursa.started_from"
"""Of a version: the version, `models:/<name>/<version>`, whose weights it began with."""
REGISTRY_SCHEME = "models:/"
LAST_TAG = "ursa.last_decision"
_SHOWN_CHARACTERS = 4000
_NO_REASON = "no reason was given"
_SKEW_S = 600.0
"""Clocks of the registry and of those who decide differ by less."""


class Registry(NamedTuple):
    """A registered model and where decisions about it are on record.

    Attributes:
        client: MLflow's client.
        name: Name of the registered model.
        root_uri: The data root.
        decided_by: See `ursa.decisions.who`.
    """

    client: "MlflowClient"
    name: str
    root_uri: str
    decided_by: str


def models_command(name: str, *words: str) -> str:
    """Return a command of `ursa models`, as a person types it for this registered model.

    Args:
        name: Name of the registered model.
        words: The command and what it is told.
    """
    option = [] if name == UNNAMED else ["--name", shlex.quote(name)]
    return f"`{' '.join(['ursa models', *words, *option])}`"


def aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Return versions by alias; nothing if there is no such model.

    Args:
        client: MLflow's client.
        name: Name of the registered model.
    """
    found = client.search_registered_models(f"name = '{name}'")
    return {} if not found else _aliases(client, name)


def finish_version(registry: Registry, version: str, report: EvalReport) -> None:
    """Give a version its aliases, as the gate says, and mark it as whole.

    The challenger is the newest: one that a kill left, and that is finished later, does not become
    it again.

    Args:
        registry: The registered model.
        version: A version whose files were verified.
        report: Its evaluation.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    if all(int(number) < int(version) for number in whole_versions(registry)):
        registry.client.set_registered_model_alias(registry.name, CHALLENGER, version)
    decide_by_gate(registry, version, report)
    registry.client.set_model_version_tag(registry.name, version, WHOLE_TAG, "true")


def decide_by_gate(registry: Registry, version: str, report: EvalReport) -> Decision:
    """Promote or refuse a version, as its evaluation says; what a person left stays left.

    Args:
        registry: The registered model.
        version: The version.
        report: Its evaluation.

    Returns:
        The decision, carried out; the same report gives one decision.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    failed = "; ".join(report.failed_gates)
    made_ms = registry.client.get_model_version(registry.name, version).creation_timestamp
    # a number that is given again is another version
    key = fingerprint("gate", _made_ms(registry), version, made_ms, report.fingerprint)
    while True:
        # before the champion is looked at: one that another run makes meanwhile is a new obstacle
        after = newest_number(registry.root_uri, registry.name)
        settle(registry)
        obstacle = _obstacle(registry, version, report) if report.gate_passed else failed
        event: Event = "refused" if obstacle else "promoted"
        reason = obstacle or "the gate holds"
        if event == "promoted" and report.comparison is not None:
            from ursa.gate import comparison_text  # noqa: PLC0415  (torch: seconds)

            reason = f"{reason}; {comparison_text(report.comparison)}"
        uri = report.manifest_uri
        with contextlib.suppress(OvertakenError):
            return _decide(registry, event, version, reason, report_uri=uri, key=key, after=after)


def _obstacle(registry: Registry, version: str, report: EvalReport) -> str | None:
    """Return why a version does not become champion although its gate holds."""
    all_the_same = f"{models_command(registry.name, 'promote', version)} takes it all the same"
    found = _by_number(registry)
    for decision in standing(decisions_of(registry)):
        was_left = decision.event == "rolled_back" and decision.version == version
        if was_left and _is_same(decision, version, found):
            by = f"{decision.decided_by} rolled it back ({decision.reason})"
            return f"the gate holds, but {by}; {all_the_same}"
    champion = aliases(registry.client, registry.name).get(CHAMPION)
    if taken := taken_down(registry.client, found[version]):
        return f"the gate holds, but it was made of what is taken down ({taken}); {all_the_same}"
    compared = report.comparison.champion_version if report.comparison else None
    if champion in {None, version, compared}:
        return None
    tags = found[champion].tags if champion in found else {}
    if "ursa.registration_key" not in tags or DAMAGED_TAG in tags:
        return None  # not one that this pipeline could measure
    before = f"version {compared}" if compared else "none"
    return (
        f"the gate holds, but version {champion} became champion meanwhile, and it was compared "
        f"with {before}; {all_the_same}"
    )


def promote(registry: Registry, version: str, reason: str | None) -> Decision | None:
    """Make a version champion by hand.

    Args:
        registry: The registered model.
        version: Its number.
        reason: Why; one that the gate refused needs it.

    Returns:
        The decision, carried out; None if the version is champion already.

    Raises:
        ConfigError: If there is no such version, or it is not whole, or was refused or taken down
            and there is no reason, or decisions are on record in another data root.
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    versions = whole_versions(registry)
    if version not in versions:
        raise ConfigError(
            f"{registry.name} has no whole version {version}; there are: "
            f"{', '.join(versions) or 'none'} ({models_command(registry.name, 'list')})"
        )
    _check_root(registry)
    settle(registry)
    if aliases(registry.client, registry.name).get(CHAMPION) == version:
        return None
    tags = versions[version].tags
    if not (reason or "").strip() and tags.get("ursa.gate_passed") == "false":
        raise ConfigError(
            f"the gate refused version {version}: {tags.get('ursa.failed_gates')}; say why it is "
            "to be champion all the same: --reason"
        )
    _ask_for_a_reason(registry, versions[version], reason)
    return _decide(registry, "promoted", version, (reason or "").strip() or _NO_REASON)


def rollback(
    registry: Registry, reason: str | None, *, among: Collection[str] | None = None
) -> Decision:
    """Make the version champion again that was it before.

    A rollback that was interrupted is finished, and no second one made. Where the champion was
    deleted in MLflow, the one before it is restored.

    Args:
        registry: The registered model.
        reason: Why; a version that was made of what is taken down needs one.
        among: Versions that come into question; None is all that are whole.

    Returns:
        The decision, carried out.

    Raises:
        ConfigError: If there is no champion, or none before it is on record or there any more, or
            it was taken down and there is no reason, or decisions are on record in another data
            root.
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    _check_root(registry)
    finished = _finish(registry)
    if finished and finished[-1].event == "rolled_back":
        return finished[-1]
    if (restored := restore_champion(registry, reason)) is not None:
        return restored
    champion = aliases(registry.client, registry.name).get(CHAMPION)
    promote_one = models_command(registry.name, "promote", "VERSION")
    if champion is None:
        raise ConfigError(f"{registry.name} has no champion; {promote_one}")
    whole = whole_versions(registry)
    target = next(
        (
            number
            for number in former_champions(registry, champion)
            if number in whole and (among is None or number in among)
        ),
        None,
    )
    if target is None:
        last_uri = _tags(registry).get(LAST_TAG)
        is_here = last_uri and storage.is_below(last_uri, registry.root_uri)
        elsewhere = "" if is_here else ", or set URSA_DATA_URI to the data root of the runs"
        raise ConfigError(
            f"no champion before version {champion} is on record at {registry.root_uri}; name one "
            f"with {promote_one}{elsewhere}"
        )
    _ask_for_a_reason(registry, whole[target], reason)
    return _decide(
        registry, "rolled_back", champion, (reason or "").strip() or _NO_REASON, champion=target
    )


def settle(registry: Registry) -> list[Decision]:
    """Carry out the decisions on record that a kill has left undone; restore a lost champion.

    Args:
        registry: The registered model.

    Returns:
        The decisions that were carried out, oldest first. Void ones are passed over, which is put
        on record.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    finished = _finish(registry)
    restored = restore_champion(registry)
    return finished if restored is None else [*finished, restored]


def _finish(registry: Registry) -> list[Decision]:
    """Carry out what is pending, or void it."""
    finished = []
    # those of a registry that is restored from before its first decision come one after the other
    while pending := pending_decisions(registry):
        for decision in pending:
            problem = void(registry, decision)
            if problem is None:
                _carry_out(registry, decision)
                finished.append(decision)
                continue
            _put_void(registry, decision, problem)
            registry.client.set_registered_model_tag(registry.name, LAST_TAG, decision.record_uri)
    return [decision for decision in finished if decision.event != "voided"]


def void(registry: Registry, decision: Decision) -> str | None:
    """Return why a decision is not carried out: what it makes champion is gone, or taken down.

    Args:
        registry: The registered model.
        decision: One that was not carried out.

    Returns:
        What is wrong; None if nothing, or if the decision moves no alias.
    """
    if decision.event in {"refused", "voided"}:
        return None
    versions, number = _by_number(registry), decision.champion or decision.version
    if _is_same(decision, number, versions):
        tags = versions[number].tags
        if DAMAGED_TAG in tags:
            return f"version {number} is damaged ({tags[DAMAGED_TAG]})"
        has_reason = decision.report_uri is None and decision.reason != _NO_REASON
        taken = None if has_reason else taken_down(registry.client, versions[number])
        return f"version {number} was made of what is taken down ({taken})" if taken else None
    what = "is another model now" if number in versions else "is not there any more"
    return f"version {number} {what}"


def _put_void(registry: Registry, decision: Decision, problem: str) -> None:
    now = aliases(registry.client, registry.name).get(CHAMPION)
    event = decision.event.replace("_", " ")
    record_decision(
        registry.root_uri,
        registry.name,
        "voided",
        registry_made_ms=decision.registry_made_ms,
        version=decision.version,
        champion=now,
        champion_before=now,
        previous_uri=_tags(registry).get(LAST_TAG),
        reason=f"decision {decision.number} ({event} version {decision.version}) was not carried "
        f"out: {problem}",
        decided_by=registry.decided_by,
        key=fingerprint("voided", decision.record_uri),
        voids_uri=decision.record_uri,
    )


def restore_champion(registry: Registry, reason: str | None = None) -> Decision | None:
    """Make the newest former champion champion again where the champion was deleted in MLflow.

    One that was made of what is taken down is passed over.

    Args:
        registry: The registered model; nothing is pending.
        reason: Why, beside that.

    Returns:
        The decision, carried out; None if no champion was lost, or none was before it.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    while True:
        after = newest_number(registry.root_uri, registry.name)
        lost = lost_champion(registry)
        if lost is None:
            return None
        gone, target = lost
        words = f"version {gone}, the champion, is not there any more"
        with contextlib.suppress(OvertakenError):
            return _decide(
                registry,
                "rolled_back",
                gone,
                f"{words}; {reason.strip()}" if reason and reason.strip() else words,
                champion=target,
                key=fingerprint("lost", decisions_of(registry)[-1].record_uri),
                after=after,
            )


def lost_champion(registry: Registry) -> tuple[str, str] | None:
    """Return a champion that was deleted in MLflow, alias and all, and the one before it.

    Args:
        registry: The registered model; nothing is pending.

    Returns:
        Both; None if the champion is there, if a person took the alias off, or if no champion
        before it is there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if CHAMPION in aliases(registry.client, registry.name):
        return None
    decisions = standing(decisions_of(registry))
    gone = decisions[-1].champion if decisions else None
    if gone is None or _is_same(decisions[-1], gone, _by_number(registry)):
        return None
    whole = whole_versions(registry)
    for number in former_champions(registry, None):
        if number in whole and taken_down(registry.client, whole[number]) is None:
            return gone, number
    return None


def former_champions(registry: Registry, champion: str | None) -> list[str]:
    """Return the versions that were champion before and are there, the one to go back to first.

    Args:
        registry: The registered model.
        champion: Version that is champion now; None if there is none.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    versions = _by_number(registry)

    def named(decision: Decision, number: str | None) -> str | None:
        if number is None or _is_same(decision, number, versions):
            return number
        return f"{number} (gone)"  # not to be taken for the version that has its number now

    decisions = [
        decision.model_copy(
            update={
                "champion": named(decision, decision.champion),
                "champion_before": named(decision, decision.champion_before),
            }
        )
        for decision in standing(decisions_of(registry))
    ]
    found = earlier_champions(decisions, champion)
    return [item for item in found if item in versions and item != champion]


def taken_down(client: "MlflowClient", version: Any) -> str | None:
    """Return which sources of a version are taken down, or of one whose weights it began with.

    Args:
        client: MLflow's client.
        version: The version.

    Returns:
        What its tag says, in one line; None if nothing.
    """
    seen = {(version.name, str(version.version))}
    while TAKEDOWN_TAG not in version.tags:
        before = version.tags.get(STARTED_FROM_TAG, "").removeprefix(REGISTRY_SCHEME)
        name, _, number = before.rpartition("/")
        if not name or (name, number) in seen:
            return None
        seen.add((name, number))
        query = f"name = '{name}' and version_number = {number}"
        found = list(client.search_model_versions(query)) if number.isdecimal() else []
        if not found:
            return None
        version = found[0]
    return "; ".join(version.tags[TAKEDOWN_TAG].splitlines())


def _ask_for_a_reason(registry: Registry, version: Any, reason: str | None) -> None:
    """Refuse to make a version champion without a reason if it was taken down."""
    if not (reason or "").strip() and (taken := taken_down(registry.client, version)):
        raise ConfigError(
            f"version {version.version} was made of what is taken down ({taken}); say why it is to "
            "be champion all the same: --reason"
        )


def _check_root(registry: Registry) -> None:
    """Refuse to begin a second record of decisions in another data root.

    A copy of a data root has the record too, and one that cannot be asked stops nobody.

    Raises:
        ConfigError: If the last decision is there to be read in another one, and not here.
    """
    last_uri = _tags(registry).get(LAST_TAG)
    if not last_uri or storage.is_below(last_uri, registry.root_uri):
        return
    if last_uri in {decision.record_uri for decision in decisions_of(registry)}:
        return
    try:
        is_there = storage.exists(last_uri)
    except StorageError as error:
        logger.warning("the last decision about %s is not here: %s", registry.name, error)
        return
    if is_there:
        raise ConfigError(
            f"decisions about {registry.name} are on record beside {last_uri}, and the data root "
            f"is {registry.root_uri}; set URSA_DATA_URI, or --root, to the data root of the runs"
        )


def _by_number(registry: Registry) -> dict[str, Any]:
    return {str(item.version): item for item in all_versions(registry)}


def _model_of(version: Any) -> str:
    """Return what a version has in common with no other model, whatever its number."""
    made = f"made {version.creation_timestamp}"  # one that others registered
    return str(version.tags.get("ursa.registration_key") or made)


def _models(versions: Mapping[str, Any], numbers: Iterable[str | None]) -> dict[str, str]:
    return {
        number: _model_of(versions[number]) for number in numbers if number and number in versions
    }


def _is_same(decision: Decision, number: str, versions: Mapping[str, Any]) -> bool:
    """Whether a version that a decision names is there and the same model."""
    if number not in versions:
        return False
    if number in decision.models:
        return decision.models[number] == _model_of(versions[number])
    # a record of an older release: what was registered after it is not what it is about
    decided_s = datetime.fromisoformat(decision.decided_at).timestamp()
    return int(versions[number].creation_timestamp) / 1000 < decided_s + _SKEW_S


def pending_decisions(registry: Registry) -> list[Decision]:
    """Return the decisions on record that were not carried out, oldest first.

    Args:
        registry: The registered model.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    decisions = decisions_of(registry)
    last_uri = _tags(registry).get(LAST_TAG)
    numbers = {decision.record_uri: decision.number for decision in decisions}
    if last_uri in numbers:
        return [item for item in decisions if item.number > numbers[last_uri]]
    # none was carried out, or one of another data root was the last
    return [item for item in decisions if item.previous_uri == last_uri]


def all_versions(registry: Registry) -> list[Any]:
    """Return all versions, as MLflow has them.

    Args:
        registry: The registered model.
    """
    return list(registry.client.search_model_versions(f"name = '{registry.name}'"))


def decisions_of(registry: Registry) -> list[Decision]:
    """Return the decisions about this registered model, oldest first.

    Those about a model of the same name in another registry, or in one that was emptied, are left
    out: its versions are others.

    Args:
        registry: The registered model.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    made_ms = _made_ms(registry)
    found = list_decisions(registry.root_uri, registry.name)
    return [decision for decision in found if decision.registry_made_ms == made_ms]


def whole_versions(registry: Registry) -> dict[str, Any]:
    """Return the versions that were registered to the end and lack nothing, the newest first.

    Args:
        registry: The registered model.
    """
    whole = [
        item
        for item in all_versions(registry)
        if WHOLE_TAG in item.tags and DAMAGED_TAG not in item.tags
    ]
    return {
        str(item.version): item
        for item in sorted(whole, key=lambda item: int(item.version), reverse=True)
    }


def record_move(registry: Registry) -> Decision | None:
    """Put on record that the alias was moved without a decision; None if it was not.

    Args:
        registry: The registered model; nothing is pending.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    moved = moved_alias(registry)
    if moved is None:
        return None
    before, now = moved
    version = now or before or ""
    found = _by_number(registry)
    gone = before is not None and before not in found
    decision = record_decision(
        registry.root_uri,
        registry.name,
        "moved",
        registry_made_ms=_made_ms(registry),
        version=version,
        champion=now,
        champion_before=before,
        previous_uri=_tags(registry).get(LAST_TAG),
        reason="its version was deleted in MLflow" if gone else "the alias was moved in MLflow",
        decided_by="unknown",
        models=_models(found, (version, before)),
    )
    _carry_out(registry, decision)
    return decision


def moved_alias(registry: Registry) -> tuple[str | None, str | None] | None:
    """Return the champion of the last decision and the present one, if they differ.

    Args:
        registry: The registered model; nothing is pending.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    decisions = decisions_of(registry)
    if not decisions or _tags(registry).get(LAST_TAG) != decisions[-1].record_uri:
        return None
    carried_out = standing(decisions)
    if not carried_out:
        return None
    now, before = aliases(registry.client, registry.name).get(CHAMPION), carried_out[-1].champion
    return None if now == before else (before, now)


def _decide(
    registry: Registry,
    event: Event,
    version: str,
    reason: str,
    *,
    champion: str | None = None,
    report_uri: str | None = None,
    key: str | None = None,
    after: int | None = None,
) -> Decision:
    """Put a decision on record, unless there is one since `after`, and carry it out."""
    before = aliases(registry.client, registry.name).get(CHAMPION)
    then = {"promoted": version, "refused": before}.get(event, champion)
    found = _by_number(registry)
    decision = record_decision(
        registry.root_uri,
        registry.name,
        event,
        registry_made_ms=_made_ms(registry),
        version=version,
        champion=then,
        champion_before=before,
        previous_uri=_tags(registry).get(LAST_TAG),
        reason=reason,
        decided_by=registry.decided_by,
        report_uri=report_uri,
        key=key,
        after=after,
        models=_models(found, (version, then, before)),
    )
    if decision in pending_decisions(registry):  # not one that was made and carried out before
        _carry_out(registry, decision)
        _finish(registry)  # one that was made meanwhile, if this one has come after it
    return decision


def _carry_out(registry: Registry, decision: Decision) -> None:
    """Move the alias, describe the version, and say that it is done.

    Of two at once the later decision holds, in whatever order their steps come: whoever moves the
    alias looks afterwards whether it is that of the latest one that was carried out.
    """
    client, name = registry.client, registry.name
    if _carried_out(registry)[0] < decision.number:
        _move_alias(registry, decision)
    if decision.event != "voided" and _is_same(decision, decision.version, _by_number(registry)):
        words = f"{decision.event.replace('_', ' ')} by {decision.decided_by}: {decision.reason}"
        shown = words[:_SHOWN_CHARACTERS]
        client.set_model_version_tag(name, decision.version, "ursa.decision", shown)
        # the list of versions in MLflow shows the description, tags only in part
        client.update_model_version(name, decision.version, shown)
    if _carried_out(registry)[0] < decision.number:
        client.set_registered_model_tag(name, LAST_TAG, decision.record_uri)
    while decision.event not in {"refused", "voided"}:
        number, decisions = _carried_out(registry)
        done = max(number, decision.number)
        moves = [item for item in standing(decisions) if item.event != "refused"]
        latest = next((item for item in reversed(moves) if item.number <= done), decision)
        is_there = latest.champion is None or _is_same(
            latest, latest.champion, _by_number(registry)
        )
        if not is_there or aliases(client, name).get(CHAMPION) == latest.champion:
            return
        _move_alias(registry, latest)


def _carried_out(registry: Registry) -> tuple[int, list[Decision]]:
    """Return the number of the decision that was carried out last, 0 if none here was, and all."""
    last_uri = _tags(registry).get(LAST_TAG)  # before the list, so that the list has it
    decisions = decisions_of(registry)
    numbers = {item.record_uri: item.number for item in decisions}
    return numbers.get(last_uri or "", 0), decisions


def _move_alias(registry: Registry, decision: Decision) -> None:
    now = aliases(registry.client, registry.name).get(CHAMPION)
    if decision.event in {"refused", "voided"} or now == decision.champion:
        return
    if decision.champion is None:
        registry.client.delete_registered_model_alias(registry.name, CHAMPION)
    else:
        registry.client.set_registered_model_alias(registry.name, CHAMPION, decision.champion)


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    found = client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in dict(found).items()}


def _made_ms(registry: Registry) -> int:
    return int(registry.client.get_registered_model(registry.name).creation_timestamp)


def _tags(registry: Registry) -> dict[str, str]:
    return dict(registry.client.get_registered_model(registry.name).tags)
