"""`ursa models`: versions of a registered model, who is champion, and who has decided it."""

import json
import re
import time
from typing import Any

from cyclopts import App

from ursa.cli.backstage import call_tasks
from ursa.cli.data import AsJson, root_uri
from ursa.cli.lines import print_lines
from ursa.cli.models import check_answers, registry_uri
from ursa.errors import ConfigError

app = App(
    name="models",
    help="List registered models; promote one, roll back, show who decided what.",
)
_DEFAULT = "ursa"


@app.command(name="list")
def list_models(*, name: str = _DEFAULT, as_json: AsJson = False) -> None:
    """List the versions of a model: aliases, gate, held-out loss, last decision.

    Example: ursa models list

    Args:
        name: Of the registered model.
        as_json: Print JSON.

    Raises:
        ConfigError: If the registry does not answer.
    """
    found = call_tasks("list-models", tracking_uri=_registry(name), name=name)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if found:
        zone = time.strftime("%Z")
        print(f"version  made ({zone})".ljust(27) + "held-out loss  state       aliases")
    for item in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(item["made_s"]))
        loss = "" if item["loss"] is None else f"{item['loss']:.4f} nats"
        gate = "gate holds" if item["gate_passed"] else "refused"
        state = gate if item["is_whole"] else "HALF REGISTERED (ursa doctor --fix)"
        print_lines(
            f"{item['version']:>7}  {made}  {loss:13}  {state:11} {', '.join(item['aliases'])}"
        )
        if item["decision"]:
            print_lines(f"         {item['decision']}")
        if item["damaged"]:
            print_lines(f"         DAMAGED: {item['damaged']} (ursa doctor)")
        for line in item["takedown"].splitlines():
            print_lines(f"         TAKEN DOWN: {line}")
    if not found:
        print(f"no version of {name} yet")


@app.command
def promote(
    version: str, *, reason: str | None = None, name: str = _DEFAULT, root: str | None = None
) -> None:
    """Make a version champion, and put it on record.

    Example: ursa models promote 3 --reason "looks better on our own prompts"

    Args:
        version: Its number.
        reason: Why; a version that the gate refused needs one.
        name: Of the registered model.
        root: The data root, where decisions are on record; URSA_DATA_URI, or .ursa/data.

    Raises:
        ConfigError: If there is no such version, or it was refused and no reason is given.
    """
    decision = call_tasks(
        "promote",
        tracking_uri=_registry(name),
        root_uri=root_uri(root),
        name=name,
        version=version.removeprefix("v"),
        reason=reason,
    )
    if decision is None:
        print(f"version {version} is champion already")
        return
    before = decision["champion_before"]
    _print_champion(decision, f", was {before}" if before else "")


@app.command
def rollback(*, reason: str | None = None, name: str = _DEFAULT, root: str | None = None) -> None:
    """Make the version champion again that was it before, and put it on record.

    A second rollback goes back further. Example: ursa models rollback --reason "flickers"

    Args:
        reason: Why.
        name: Of the registered model.
        root: The data root, where decisions are on record; URSA_DATA_URI, or .ursa/data.

    Raises:
        ConfigError: If no champion before the present one is known.
    """
    decision = call_tasks(
        "rollback",
        tracking_uri=_registry(name),
        root_uri=root_uri(root),
        name=name,
        reason=reason,
    )
    before = decision["champion_before"] or f"{decision['version']}, which is gone"
    _print_champion(decision, f", was {before}")


@app.command
def history(*, name: str = _DEFAULT, root: str | None = None, as_json: AsJson = False) -> None:
    """List every promotion, refusal and rollback: when, what, who, why. Needs no server.

    Example: ursa models history

    Args:
        name: Of the registered model.
        root: The data root; URSA_DATA_URI, or .ursa/data.
        as_json: Print JSON: the records as they are committed.
    """
    from ursa.decisions import list_decisions

    found = list_decisions(root_uri(root), name)
    if as_json:
        print(json.dumps([decision.model_dump(mode="json") for decision in found], indent=1))
        return
    voided = {item.voids_uri: item.number for item in found}
    for item in found:
        what = item.event.replace("_", " ")
        champion = f"champion {item.champion_before or '-'} -> {item.champion or '-'}"
        void = f"  VOID: {voided[item.record_uri]}" if item.record_uri in voided else ""
        print_lines(
            f"{item.number:>4}  {item.decided_at}  {what} version {item.version}  {champion}{void}"
        )
        print_lines(f"      by {item.decided_by}: {item.reason}")
    if not found:
        print(f"no decision about {name} at {root_uri(root)}")


def _print_champion(decision: dict[str, Any], before: str) -> None:
    print(f"champion is version {decision['champion']}{before}")
    if decision["champion_now"] != decision["champion"]:
        print(f"a later decision made version {decision['champion_now']} champion since")


def _registry(name: str) -> str:
    """Return the address of the registry, which answers, for a model that it can hold."""
    from ursa.config import MODEL_NAME_PATTERN

    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise ConfigError(
            f"--name {name!r}: MLflow takes no name with / : . % ? @ \\ or quotes, nor none"
        )
    uri = registry_uri()
    check_answers(uri)
    return uri
