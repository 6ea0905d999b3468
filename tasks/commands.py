"""What `ursa models`, `schedule` and `doctor` call, in a process of its own: JSON in, JSON out.

The library and its command line know no MLflow and no Prefect, so `ursa.cli.backstage` runs
`python -m tasks.commands NAME ARGUMENTS` and reads the last line.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tasks import releases, tracking
from ursa.cli.backstage import WARNING
from ursa.decisions import Decision, who
from ursa.errors import ConfigError, UrsaError
from ursa.texts import PrintableRecords, printable, without_user


def list_models(*, tracking_uri: str, name: str) -> list[dict[str, Any]]:
    """Return the versions of a model, the newest first.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.

    Returns:
        Of each version, aliases, `loss` in nats, whether the gate holds, what was decided last,
        which of its sources are to be left, what it lacks, and when it was made, seconds since
        1970.

    Raises:
        ServiceError: If the server does not answer.
    """
    with tracking.service(tracking_uri) as client:
        named: dict[str, list[str]] = {}
        for alias, version in releases.aliases(client, name).items():
            named.setdefault(version, []).append(alias)
        found = client.search_model_versions(f"name = '{name}'")
        return [
            {
                "version": str(item.version),
                "aliases": sorted(named.get(str(item.version), [])),
                "is_whole": releases.WHOLE_TAG in item.tags,
                "damaged": item.tags.get(releases.DAMAGED_TAG, ""),
                "gate_passed": item.tags.get("ursa.gate_passed") == "true",
                "loss": json.loads(item.tags.get("ursa.metrics", "{}")).get("eval/loss"),
                "decision": item.tags.get("ursa.decision", ""),
                "takedown": item.tags.get(releases.TAKEDOWN_TAG, ""),
                "made_s": (item.creation_timestamp or 0) / 1000,
            }
            for item in sorted(found, key=lambda item: int(item.version), reverse=True)
        ]


def promote(
    *, tracking_uri: str, root_uri: str, name: str, version: str, reason: str | None
) -> dict[str, Any] | None:
    """See `tasks.releases.promote`.

    Args:
        tracking_uri: Address of the tracking server.
        root_uri: The data root.
        name: Name of the registered model.
        version: Number of the version.
        reason: Why.

    Returns:
        The decision, and `champion_now`; None if the version is champion already.

    Raises:
        UrsaError: What that function raises, and `ServiceError`.
    """
    with tracking.service(tracking_uri) as client:
        registry = releases.Registry(client, name, root_uri, who())
        decision = releases.promote(_known(registry), version, reason)
        return None if decision is None else _answer(registry, decision)


def rollback(*, tracking_uri: str, root_uri: str, name: str, reason: str | None) -> dict[str, Any]:
    """See `tasks.releases.rollback`.

    Args:
        tracking_uri: Address of the tracking server.
        root_uri: The data root.
        name: Name of the registered model.
        reason: Why.

    Returns:
        The decision, and `champion_now`.

    Raises:
        UrsaError: What that function raises, and `ServiceError`.
    """
    with tracking.service(tracking_uri) as client:
        registry = releases.Registry(client, name, root_uri, who())
        return _answer(registry, releases.rollback(_known(registry), reason))


def doctor(
    *, tracking_uri: str, prefect_url: str, root_uri: str, fix: bool, security: bool
) -> list[dict[str, str]]:
    """See `tasks.doctor.examine`.

    Args:
        tracking_uri: Address of the tracking server.
        prefect_url: Address of the Prefect server.
        root_uri: The data root.
        fix: Whether what can be mended is mended.
        security: Whether ports and passwords are looked at too.

    Returns:
        `area`, `state`, `text` and `advice` of each finding.
    """
    from tasks.doctor import examine  # noqa: PLC0415  (what reads videos: half a second)

    found = examine(
        tracking_uri=tracking_uri,
        prefect_url=prefect_url,
        root_uri=root_uri,
        fix=fix,
        security=security,
    )
    return [item._asdict() for item in found]


def schedule(
    *, prefect_url: str, active: bool | None, parameters: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """See `tasks.schedules.switch`.

    Args:
        prefect_url: Address of the Prefect server.
        active: Whether the schedule is on afterwards; None changes nothing.
        parameters: What its runs get in place of what they got before.

    Returns:
        How the schedule is.
    """
    from tasks.schedules import switch  # noqa: PLC0415  (Prefect: a second)

    return switch(prefect_url, active=active, parameters=parameters)


def flag_versions(
    *, tracking_uri: str, directories: Sequence[str], text: str
) -> list[dict[str, Any]]:
    """Mark the versions of some models: a source that they were made of is to be left.

    Args:
        tracking_uri: Address of the tracking server.
        directories: Of the exported models.
        text: Which source, and why.

    Returns:
        Name, number, aliases and model directory of each version.

    Raises:
        ServiceError: If the server does not answer.
    """
    flagged = []
    with tracking.service(tracking_uri) as client:
        for item in client.search_model_versions():
            directory = item.tags.get("ursa.model_directory")
            if directory not in directories:
                continue
            before = item.tags.get(releases.TAKEDOWN_TAG, "").splitlines()
            lines = "\n".join(dict.fromkeys((*before, printable(text))))
            client.set_model_version_tag(item.name, item.version, releases.TAKEDOWN_TAG, lines)
            found = releases.aliases(client, item.name).items()
            aliases = sorted(alias for alias, number in found if number == str(item.version))
            flagged.append(
                {
                    "name": item.name,
                    "version": str(item.version),
                    "aliases": aliases,
                    "directory": directory,
                }
            )
    return flagged


def run_schedule(*, prefect_url: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """See `tasks.schedules.run_once`.

    Args:
        prefect_url: Address of the Prefect server.
        parameters: What the run gets in place of the deployment's parameters.

    Returns:
        The run.
    """
    from tasks.schedules import run_once  # noqa: PLC0415  (Prefect: a second)

    return run_once(prefect_url, parameters)


def _answer(registry: releases.Registry, decision: Decision) -> dict[str, Any]:
    """Return a decision, and as `champion_now` who is champion: another may have come after it."""
    now = releases.aliases(registry.client, registry.name).get(releases.CHAMPION)
    return {**decision.model_dump(mode="json"), "champion_now": now}


def _known(registry: releases.Registry) -> releases.Registry:
    """Return a registry that holds the model."""
    if not registry.client.search_registered_models(f"name = '{registry.name}'"):
        raise ConfigError(f"the registry holds no model {registry.name!r}; --name says another")
    return registry


COMMANDS: Mapping[str, Callable[..., Any]] = {
    "list-models": list_models,
    "promote": promote,
    "rollback": rollback,
    "schedule": schedule,
    "run-schedule": run_schedule,
    "flag-versions": flag_versions,
    "doctor": doctor,
}


def main(name: str, arguments: str) -> int:
    """Run a command and print its answer.

    Args:
        name: One of `COMMANDS`.
        arguments: JSON object.

    Returns:
        Exit status: 1 after an error, whose message is the last line of stderr. Before it, a line
        each, is what our own code warns of.
    """
    _show_warnings()
    try:
        answer = COMMANDS[name](**json.loads(arguments))
    except UrsaError as error:
        message = without_user(printable(" ".join(str(error).split())))
        sys.stderr.write(f"error: {message}\n")
        return 1
    sys.stdout.write(f"{json.dumps(answer)}\n")
    return 0


def _show_warnings() -> None:
    """Mark our own warnings on stderr: the libraries write there too."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"{WARNING}%(message)s"))
    handler.addFilter(PrintableRecords())
    for name in ("ursa", "tasks"):
        logging.getLogger(name).addHandler(handler)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
