"""The record of releases: every promotion, refusal and rollback of a registered model, for good.

Decisions are numbered and put if absent, as versions of data sets are: of two at once one takes a
number, and the other looks again; a damaged one keeps its number and is passed over with a
warning. One is written before the alias is moved; what a kill left
undone is found and finished by the next (`tasks.releases`).
"""

import contextlib
import getpass
import logging
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from pydantic import Field

from ursa import storage
from ursa.config import FrozenModel
from ursa.errors import ManifestError, UrsaError

logger = logging.getLogger(__name__)

Event = Literal["promoted", "refused", "rolled_back", "moved", "voided"]


class Decision(FrozenModel):
    """A decision about a version of a registered model, committed; it never changes."""

    record_uri: str
    number: int = Field(ge=1)
    previous_uri: str | None = Field(
        description="the decision that was carried out last, in any data root"
    )
    model_name: str
    registry_made_ms: int = Field(
        description="when the registered model was made, milliseconds since 1970: versions of "
        "another registry have nothing to do with those of this one"
    )
    event: Event = Field(
        description="`moved`: the alias was moved without a decision; `voided`: a decision was not "
        "carried out, as what it makes champion is gone or another model"
    )
    version: str = Field(description="the version that was judged, or was left")
    champion: str | None = Field(description="version that is champion after it")
    champion_before: str | None
    reason: str
    decided_by: str = Field(description="user@host, with the flow run if it was one")
    decided_at: str = Field(description="UTC, ISO 8601")
    report_uri: str | None = Field(description="the EvalReport that decided; None: a person did")
    key: str = Field(description="the same decision made again has the same")
    models: Mapping[str, str] = Field(
        default={},
        description="what model each version named here is, by number: a registry that is restored "
        "from a copy gives numbers again; empty in records of older releases",
    )
    voids_uri: str | None = Field(default=None, description="the decision that was voided")


def who(flow_run_id: str | None = None) -> str:
    """Return who decides.

    Args:
        flow_run_id: Of the flow run, if it is one.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user, as in some containers
        user = "unknown"
    name = f"{user}@{socket.gethostname()}"
    return f"flow run {flow_run_id} of {name}" if flow_run_id else name


class OvertakenError(UrsaError):
    """Another decision was committed since the newest one that was looked at."""


def record_decision(  # noqa: PLR0913  (the fields of the record)
    root_uri: str,
    model_name: str,
    event: Event,
    *,
    registry_made_ms: int,
    version: str,
    champion: str | None,
    champion_before: str | None,
    previous_uri: str | None,
    reason: str,
    decided_by: str,
    report_uri: str | None = None,
    key: str | None = None,
    after: int | None = None,
    models: Mapping[str, str] | None = None,
    voids_uri: str | None = None,
) -> Decision:
    """Commit the next decision about a model, unless the same was committed before.

    Args:
        root_uri: The data root.
        model_name: The registered model.
        event: What is decided.
        registry_made_ms: When the registered model was made.
        version: The version that is judged, or left.
        champion: Version that is champion after it; None leaves none.
        champion_before: Version that is champion now.
        previous_uri: The decision that was carried out last.
        reason: Why, in words.
        decided_by: See `who`.
        report_uri: The evaluation that decided, if one did.
        key: The same decision has the same key; None is a new one.
        after: Number of the newest decision that was looked at; None commits after any.
        models: What model each version is, by number.
        voids_uri: The decision that was not carried out, if this one says so.

    Returns:
        The decision that stands, with its number and time.

    Raises:
        OvertakenError: If there is a decision since `after`.
        ManifestError: If another run takes the number with a damaged record.
        StorageError: If the store refuses or does not answer.
    """
    key = key or secrets.token_hex(16)
    while True:
        # one listing for both: what another run writes after it takes the number that is next here
        numbers = _numbers(root_uri, model_name)
        for decision in _readable(root_uri, model_name, numbers):
            if decision.key == key:
                return decision
        number = max(numbers, default=0) + 1
        if after is not None and number > after + 1:
            raise OvertakenError(f"decision {number - 1} about {model_name} came since {after}")
        decision = Decision(
            record_uri=_record_uri(root_uri, model_name, number),
            number=number,
            previous_uri=previous_uri,
            model_name=model_name,
            registry_made_ms=registry_made_ms,
            event=event,
            version=version,
            champion=champion,
            champion_before=champion_before,
            reason=reason,
            decided_by=decided_by,
            decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
            report_uri=report_uri,
            key=key,
            models=models or {},
            voids_uri=voids_uri,
        )
        if storage.commit_record(decision.record_uri, decision).key == key:
            return decision
        # another decision has taken the number


def newest_number(root_uri: str, model_name: str) -> int:
    """Return the number of the newest decision about a model, 0 without one.

    Args:
        root_uri: The data root.
        model_name: The registered model.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return max(_numbers(root_uri, model_name), default=0)


def list_decisions(root_uri: str, model_name: str) -> list[Decision]:
    """Return all decisions about a model that can be read, oldest first.

    A damaged one is named in a warning.

    Args:
        root_uri: The data root.
        model_name: The registered model.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return _readable(root_uri, model_name, _numbers(root_uri, model_name))


def standing(decisions: Sequence[Decision]) -> list[Decision]:
    """Return the decisions that were carried out or may be: without those that others void.

    Args:
        decisions: All of a model, oldest first.
    """
    voided = {decision.voids_uri for decision in decisions}
    return [item for item in decisions if item.event != "voided" and item.record_uri not in voided]


def earlier_champions(decisions: Sequence[Decision], champion: str | None) -> list[str]:
    """Return the versions that were champion before, the one to go back to first.

    A rollback takes the version that it left off the list, so that a second one goes back further.

    Args:
        decisions: All of a model that stand, oldest first.
        champion: Version that is champion now; None if there is none.
    """
    before: list[str] = []
    for decision in decisions:
        if decision.event == "refused":
            continue
        if decision.champion_before and before[-1:] != [decision.champion_before]:
            before.append(decision.champion_before)
        if decision.event == "rolled_back":
            while before and before[-1] != decision.champion:
                before.pop()
        if decision.champion and before[-1:] != [decision.champion]:
            before.append(decision.champion)
    if before[-1:] == [champion]:
        before.pop()
    return before[::-1]


def _readable(root_uri: str, model_name: str, numbers: Sequence[int]) -> list[Decision]:
    uris = [_record_uri(root_uri, model_name, number) for number in numbers]
    with contextlib.suppress(ManifestError):
        return [item for item in storage.load_records(uris, Decision) if item is not None]
    decisions = []
    for uri in uris:
        try:
            found = storage.load_lasting(uri, Decision)
        except ManifestError as error:
            logger.warning("a decision is passed over: %s", error)
            continue
        if found is not None:
            decisions.append(found)
    return decisions


def _numbers(root_uri: str, model_name: str) -> list[int]:
    """Return the numbers that are taken, ascending."""
    try:
        listed = storage.list_files(_folder_uri(root_uri, model_name), with_etag=False)
    except FileNotFoundError:
        return []
    found = (re.search(r"/([0-9]{6})\.json$", item.uri) for item in listed)
    return sorted(int(match[1]) for match in found if match)


def _record_uri(root_uri: str, model_name: str, number: int) -> str:
    return storage.join(_folder_uri(root_uri, model_name), f"{number:06d}.json")


def _folder_uri(root_uri: str, model_name: str) -> str:
    # a name must stay one segment, whatever is in it
    return storage.join(root_uri, "releases", quote(model_name, safe="").replace(".", "%2E"))
