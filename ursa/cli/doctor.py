"""`ursa doctor`: what is wrong with the installation, the services, and what a kill has left."""

import json
import shutil
import sys
import textwrap

from ursa.cli.backstage import call_tasks
from ursa.cli.data import AsJson, Flag, root_uri
from ursa.cli.models import prefect_uri, registry_uri
from ursa.texts import printable

_WORDS = {"ok": "ok", "note": "note", "wrong": "WRONG", "mended": "mended"}


def doctor(
    root: str | None = None, *, fix: Flag = False, security: Flag = False, as_json: AsJson = False
) -> None:
    """Check installation, disk, store, services, and what a kill has left in MLflow and Prefect.

    Exit status 1 if something is wrong. What is under way is left alone. Example: ursa doctor --fix

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        fix: Mend it: close dead runs, finish or delete half-registered versions, put aliases back.
        security: Look for ports open to others, missing and known passwords too.
        as_json: Print JSON.
    """
    found = call_tasks(
        "doctor",
        tracking_uri=registry_uri(),
        prefect_url=prefect_uri(),
        root_uri=root_uri(root),
        fix=fix,
        security=security,
    )
    num_wrong = sum(item["state"] == "wrong" for item in found)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_table(found)
        print(f"\n{num_wrong} wrong" if num_wrong else "\nall is well")
    if num_wrong:
        sys.exit(1)


def _print_table(found: list[dict[str, str]]) -> None:
    columns = max(shutil.get_terminal_size((110, 24)).columns, 60)
    for item in found:
        head = f"{item['area']:13} {_WORDS[item['state']]:7} "
        text = printable(item["text"] + (f"; to do: {item['advice']}" if item["advice"] else ""))
        print(
            textwrap.fill(
                text,
                columns,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
