"""`ursa schedule`: the schedule of the retraining, on or off, or one run of it now."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cyclopts import App

from ursa.cli.backstage import call_tasks
from ursa.cli.data import AsJson, Changes, parse_changes
from ursa.cli.lines import print_lines
from ursa.cli.models import check_answers, prefect_uri
from ursa.errors import ConfigError

app = App(
    name="schedule",
    help="Switch the schedule of ursa/scheduled-retraining on or off; run it once.",
)


@app.command
def on(
    *,
    source: str | None = None,
    preset: str | None = None,
    changes: Changes = (),
    as_json: AsJson = False,
) -> None:
    """Switch the schedule on: it retrains when the source holds something new.

    The event ursa.data.new and `ursa schedule run` use the same source and configuration.

    Example: ursa schedule on --source s3://bucket/videos --preset small

    Args:
        source: What its runs look at; without it, what they looked at before.
        preset: Likewise, the preset.
        changes: Values in place of those of the preset, such as retraining.max_steps=200. All that
            were given before are gone with any new one, and with --preset.
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, it has no such deployment, the source is not there, or
            the values are no configuration.
    """
    prefect = prefect_uri()
    given = _given(prefect, source, preset, changes)
    check_answers(prefect, name="Prefect", variable="PREFECT_API_URL")
    found = call_tasks("schedule", prefect_url=prefect, active=True, parameters=given)
    _say(found, as_json=as_json)


@app.command
def off(*, as_json: AsJson = False) -> None:
    """Switch the schedule off; a run that is under way goes on.

    Args:
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, or it has no such deployment.
    """
    _say(call_tasks("schedule", prefect_url=_prefect(), active=False), as_json=as_json)


@app.command
def show(*, as_json: AsJson = False) -> None:
    """Say whether the schedule is on, when it runs next, and on what.

    Args:
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, or it has no such deployment.
    """
    _say(call_tasks("schedule", prefect_url=_prefect(), active=None), as_json=as_json)


@app.command
def run(
    *,
    source: str | None = None,
    preset: str | None = None,
    changes: Changes = (),
    as_json: AsJson = False,
) -> None:
    """Run the retraining once, now, whether the schedule is on or off.

    It ends as NoNewData if the source holds nothing new; while another one is under way, Prefect
    cancels it.

    Args:
        source: What it looks at; without it, what `ursa schedule show` says.
        preset: Likewise, the preset.
        changes: Likewise, values in place of those of the preset.
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, it has no such deployment, the source is not there, or
            the values are no configuration.
    """
    prefect = prefect_uri()
    given = _given(prefect, source, preset, changes)
    check_answers(prefect, name="Prefect", variable="PREFECT_API_URL")
    found = call_tasks("run-schedule", prefect_url=prefect, parameters=given)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_lines(f"{found['name']} is to run on {_what(found['parameters'])}: {found['url']}")
    if not found["has_worker"]:
        print("no worker is up, so it waits: `make up` starts one")


def _prefect() -> str:
    uri = prefect_uri()
    check_answers(uri, name="Prefect", variable="PREFECT_API_URL")
    return uri


def _given(
    prefect: str, source: str | None, preset: str | None, changes: Sequence[str]
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if source is not None:
        given["source_uri"] = _checked(source, prefect)
    if preset is not None:  # without the values that an earlier call has changed
        given |= {"preset": preset, "overrides": None}
    if changes:
        given["overrides"] = parse_changes(changes)
    return given


def _checked(source: str, prefect: str) -> str:
    """Return the address of a source; one that is nowhere is refused, as far as that is known.

    The worker reads it, not this process. A server on the loopback address has its workers on this
    machine, as after `make up`, and sees the same paths; those of another server may have their own
    disks. An object store may be reached from there alone, so it is not asked.
    """
    from ursa.sources.names import refuse_secret
    from ursa.storage import absolute_uri, local_path

    refuse_secret(source)
    scheme, is_uri, _ = source.partition("://")
    if is_uri and scheme.lower() in {"s3", "https"}:
        return source
    if not source or (is_uri and scheme != "file"):
        raise ConfigError(
            f"--source {source!r} is no source; give a directory, a file, s3://bucket/prefix or "
            "another one of docs/sources.md"
        )
    path = absolute_uri(source)
    if os.path.lexists(local_path(path)):
        return path
    if is_uri or not _is_this_machine(prefect):
        print(f"warning: {path} is not on this machine; workers must find it", file=sys.stderr)
        return path
    raise ConfigError(
        f"--source {source} does not exist ({path}); make it, or correct the name. If workers on "
        f"other machines have it: --source {Path(path).as_uri()}"
    )


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _what(parameters: dict[str, Any]) -> str:
    overrides = parameters.get("overrides") or {}
    changed = f", {json.dumps(overrides)}" if overrides else ""
    return f"{parameters.get('source_uri')} with preset {parameters.get('preset')}{changed}"


def _say(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    due = found["next"]
    when = f", next {datetime.fromisoformat(due):%Y-%m-%d %H:%M %Z}" if due else ""
    print(f"{'on' if found['active'] else 'off'}: {', '.join(found['schedules'])}{when}")
    print_lines(f"     {_what(found['parameters'])}; {found['url']}")
    if found["event_parameters"] != found["parameters"]:
        print_lines(
            f"     but the event and `ursa schedule run`: {_what(found['event_parameters'])}; "
            "`ursa schedule on` gives them what the schedule has"
        )
