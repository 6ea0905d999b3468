"""The `ursa` command: a module a command; each imports what it needs when it runs."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from ursa import __version__
from ursa.cli import benchmark, data, path, release, schedule
from ursa.cli.data_versions import changes, uses, versions
from ursa.cli.demo import demo
from ursa.cli.doctor import doctor
from ursa.cli.evaluate import evaluate
from ursa.cli.generate import generate
from ursa.cli.merge import merge
from ursa.cli.models import refuse_secrets
from ursa.cli.plan import plan
from ursa.errors import UrsaError
from ursa.texts import PrintableRecords, printable, without_user

app = App(
    name="ursa",
    version=__version__,
    help="Video generation models from your own videos.",
    help_format="plaintext",  # the others load a Markdown parser, a quarter of a second
)
app.command(generate)
app.command(demo)
app.command(evaluate)
app.command(plan)
app.command(merge)
app.command(doctor)
app.command(path.app)
app.command(data.app)
app.command(release.app)
app.command(benchmark.app)
app.command(schedule.app)
for command in (versions, changes, uses):
    data.app.command(command)


@app.command
def config(preset: str = "tiny") -> None:
    """Print a preset as the pipeline reads it.

    Example: ursa config small

    Args:
        preset: Name of the preset.

    Raises:
        ConfigError: If there is no such preset.
    """
    import yaml

    from ursa.config import load_config

    print(yaml.safe_dump(load_config(preset).model_dump(mode="json"), sort_keys=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one line and exit status 1, or 2 if it cannot be parsed.

    Args:
        arguments: What stands after `ursa`; None takes it from the command line.
    """
    if logging.lastResort is not None:  # what the library warns of
        logging.lastResort.addFilter(PrintableRecords())
    given = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_secrets(given)
        app(given, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except CycloptsError as error:
        sys.stderr.write(f"error: {_one_line(error)}; --help lists what there is\n")
        sys.exit(2)
    except UrsaError as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        sys.exit(1)


def _one_line(error: Exception) -> str:
    return without_user(printable(" ".join(str(error).split())))
