"""What needs a service's own library runs in another process: the command line knows none."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ursa
from ursa.errors import ConfigError

WARNING = "warning: "
"""Begins a line of stderr that the other process wants to be seen."""
logger = logging.getLogger(__name__)


def call_tasks(command: str, **arguments: object) -> Any:
    """Run a command of `tasks.commands` and return its answer; what it warns of is logged here.

    Args:
        command: Its name.
        **arguments: Its arguments, as JSON has them.

    Raises:
        ConfigError: With the message, if it fails.
    """
    root = str(Path(ursa.__file__).parents[1])  # `tasks` lies beside `ursa`
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # -P: a folder `tasks` where the user happens to be is not ours
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-m", "tasks.commands", command, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    # the rest is what MLflow and Prefect say of themselves
    for line in dict.fromkeys(done.stderr.splitlines()):
        if line.startswith(WARNING):
            logger.warning("%s", line.removeprefix(WARNING))
    if done.returncode:
        last = (done.stderr.strip() or f"{command} ended with {done.returncode}").splitlines()[-1]
        raise ConfigError(last.removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])
