"""Who is champion: promotion by the gate or by a person, rollback; every decision is on record.

A decision is committed in the data root first (`ursa.decisions`) and then carried out: the alias,
and last the tag `ursa.last_decision` of the registered model. So whatever a kill has left undone is
known, and the next decision, or `ursa doctor --fix`, finishes it. The client is MLflow's, from
`tasks.tracking.service`.
"""

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

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
)
from ursa.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
WHOLE_TAG = "ursa.aliased"
"""Of a version that was registered to the end."""
TAKEDOWN_TAG = "ursa.takedown"
"""Of a version: sources that it was made of and that were taken down since, one a line."""
LAST_TAG = "ursa.last_decision"
_SHOWN_CHARACTERS = 4000
_NO_REASON = "no reason was given"


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

    Args:
        registry: The registered model.
        version: A version whose files were verified.
        report: Its evaluation.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
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
    key = fingerprint("gate", _made_ms(registry), version, report.fingerprint)
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
    all_the_same = f"`ursa models promote {version}` takes it all the same"
    for decision in decisions_of(registry):
        if decision.event == "rolled_back" and decision.version == version:
            by = f"{decision.decided_by} rolled it back ({decision.reason})"
            return f"the gate holds, but {by}; {all_the_same}"
    champion = aliases(registry.client, registry.name).get(CHAMPION)
    tags = registry.client.get_model_version(registry.name, version).tags
    if taken := tags.get(TAKEDOWN_TAG):
        return f"the gate holds, but it was made of what is taken down ({taken}); {all_the_same}"
    compared = report.comparison.champion_version if report.comparison else None
    if champion in {None, version, compared}:
        return None
    found = registry.client.get_model_version(registry.name, str(champion))
    if "ursa.registration_key" not in found.tags:
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
        ConfigError: If there is no such version, or it is not whole, or was refused and there is no
            reason.
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    versions = whole_versions(registry)
    if version not in versions:
        raise ConfigError(
            f"{registry.name} has no whole version {version}; there are: "
            f"{', '.join(versions) or 'none'} (`ursa models list`)"
        )
    settle(registry)
    if aliases(registry.client, registry.name).get(CHAMPION) == version:
        return None
    tags = versions[version].tags
    if not (reason or "").strip() and tags.get("ursa.gate_passed") == "false":
        raise ConfigError(
            f"the gate refused version {version}: {tags.get('ursa.failed_gates')}; say why it is "
            "to be champion all the same: --reason"
        )
    if not (reason or "").strip() and tags.get(TAKEDOWN_TAG):
        raise ConfigError(
            f"version {version} was made of what is taken down ({tags[TAKEDOWN_TAG]}); say why it "
            "is to be champion all the same: --reason"
        )
    return _decide(registry, "promoted", version, (reason or "").strip() or _NO_REASON)


def rollback(registry: Registry, reason: str | None) -> Decision:
    """Make the version champion again that was it before.

    A rollback that was interrupted is finished, and no second one made.

    Args:
        registry: The registered model.
        reason: Why.

    Returns:
        The decision, carried out.

    Raises:
        ConfigError: If there is no champion, or none before it is on record or there any more.
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    finished = settle(registry)
    if finished and finished[-1].event == "rolled_back":
        return finished[-1]
    champion = aliases(registry.client, registry.name).get(CHAMPION)
    if champion is None:
        raise ConfigError(f"{registry.name} has no champion; `ursa models promote VERSION`")
    versions = whole_versions(registry)
    before = earlier_champions(decisions_of(registry), champion)
    target = next((item for item in before if item in versions and item != champion), None)
    if target is None:
        raise ConfigError(
            f"no champion before version {champion} is on record at {registry.root_uri}; name one "
            "with `ursa models promote VERSION`, or set URSA_DATA_URI to the data root of the runs"
        )
    return _decide(
        registry, "rolled_back", champion, (reason or "").strip() or _NO_REASON, champion=target
    )


def settle(registry: Registry) -> list[Decision]:
    """Carry out the decisions on record that a kill has left undone.

    Args:
        registry: The registered model.

    Returns:
        These decisions, oldest first.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        StorageError: If the store refuses or does not answer.
    """
    pending = pending_decisions(registry)
    for decision in pending:
        _carry_out(registry, decision)
    return pending


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
    """Return the versions that were registered to the end, by number, the newest first.

    Args:
        registry: The registered model.
    """
    whole = [item for item in all_versions(registry) if WHOLE_TAG in item.tags]
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
    decision = record_decision(
        registry.root_uri,
        registry.name,
        "moved",
        registry_made_ms=_made_ms(registry),
        version=now or before or "",
        champion=now,
        champion_before=before,
        previous_uri=_tags(registry).get(LAST_TAG),
        reason="the alias was moved in MLflow",
        decided_by="unknown",
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
    now = aliases(registry.client, registry.name).get(CHAMPION)
    return None if now == decisions[-1].champion else (decisions[-1].champion, now)


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
    )
    if decision in pending_decisions(registry):  # not one that was made and carried out before
        _carry_out(registry, decision)
    return decision


def _carry_out(registry: Registry, decision: Decision) -> None:
    client, name = registry.client, registry.name
    now = aliases(client, name).get(CHAMPION)
    if decision.event != "refused" and now != decision.champion:
        if decision.champion is None:
            client.delete_registered_model_alias(name, CHAMPION)
        else:
            client.set_registered_model_alias(name, CHAMPION, decision.champion)
    if any(str(item.version) == decision.version for item in all_versions(registry)):
        words = f"{decision.event.replace('_', ' ')} by {decision.decided_by}: {decision.reason}"
        shown = words[:_SHOWN_CHARACTERS]
        client.set_model_version_tag(name, decision.version, "ursa.decision", shown)
        # the list of versions in MLflow shows the description, tags only in part
        client.update_model_version(name, decision.version, shown)
    client.set_registered_model_tag(name, LAST_TAG, decision.record_uri)


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    found = client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in dict(found).items()}


def _made_ms(registry: Registry) -> int:
    return int(registry.client.get_registered_model(registry.name).creation_timestamp)


def _tags(registry: Registry) -> dict[str, str]:
    return dict(registry.client.get_registered_model(registry.name).tags)
