"""`ursa schedule`: the schedule of the retraining, on or off, or one run of it now."""

import json
import os
from datetime import datetime
from typing import Any

from cyclopts import App

from ursa.cli.backstage import call_tasks
from ursa.cli.data import AsJson
from ursa.cli.lines import print_lines
from ursa.cli.models import check_answers, prefect_uri

app = App(
    name="schedule",
    help="Switch the schedule of ursa/scheduled-retraining on or off; run it once.",
)


@app.command
def on(*, source: str | None = None, preset: str | None = None, as_json: AsJson = False) -> None:
    """Switch the schedule on: it retrains when the source holds something new.

    Example: ursa schedule on --source s3://bucket/videos --preset small

    Args:
        source: What its runs look at; without it, what they looked at before.
        preset: Likewise, the preset.
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, or it has no such deployment.
    """
    given = _given(source, preset)
    found = call_tasks("schedule", prefect_url=_prefect(), active=True, parameters=given)
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
def run(*, source: str | None = None, preset: str | None = None, as_json: AsJson = False) -> None:
    """Run the retraining once, now, whether the schedule is on or off.

    It ends as NoNewData if the source holds nothing new; while another one is under way, Prefect
    cancels it.

    Args:
        source: What it looks at; without it, what the deployment says.
        preset: Likewise, the preset.
        as_json: Print JSON.

    Raises:
        ConfigError: If no server answers, or it has no such deployment.
    """
    found = call_tasks("run-schedule", prefect_url=_prefect(), parameters=_given(source, preset))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_lines(f"{found['name']} is to run on {_what(found)}: {found['url']}")
    if not found["has_worker"]:
        print("no worker is up, so it waits: `make up` starts one")


def _prefect() -> str:
    uri = prefect_uri()
    check_answers(uri, name="Prefect", variable="PREFECT_API_URL")
    return uri


def _given(source: str | None, preset: str | None) -> dict[str, str]:
    given = {"source_uri": source, "preset": preset}
    if source is not None and "://" not in source:
        given["source_uri"] = os.path.abspath(source)  # noqa: PTH100  (the worker is elsewhere)
    return {key: value for key, value in given.items() if value is not None}


def _what(found: dict[str, Any]) -> str:
    parameters = found["parameters"]
    return f"{parameters.get('source_uri')} with preset {parameters.get('preset')}"


def _say(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    due = found["next"]
    when = f", next {datetime.fromisoformat(due):%Y-%m-%d %H:%M %Z}" if due else ""
    print(f"{'on' if found['active'] else 'off'}: {', '.join(found['schedules'])}{when}")
    print_lines(f"     {_what(found)}; {found['url']}")
