"""`ursa data`: verify, repair, count and show the data of runs, and try other thresholds."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from ursa.errors import ConfigError

if TYPE_CHECKING:
    from ursa.config import RunConfig

app = App(name="data", help="Verify, repair, count and show the data of runs.")

AsJson = Annotated[bool, Parameter(name="--json", negative=())]
Changes = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]
Flag = Annotated[bool, Parameter(negative=())]
Preset = Literal["tiny", "small"]


@app.command
def verify(
    root: str | None = None,
    *,
    media: Flag = False,
    preset: Preset | None = None,
    changes: Changes = (),
    as_json: AsJson = False,
) -> None:
    """Check every committed file: there, whole, of its schema, no sample missing or twice.

    Names each damaged file and what to do; exit status 1 if anything is wrong. Example:
    ursa data verify .ursa/data --media

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        media: Read all clip files too.
        preset: What made data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset, such as tokenization.fps=12; may be given again.
        as_json: Print JSON.
    """
    from ursa.inspection.verify import verify_root

    found = verify_root(_root(root), with_media=media, config=_config(preset, changes))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        print(
            f"checked {found.num_clip_sets} sets of clips, {found.num_selections} selections, "
            f"{found.num_token_sets} sets of tokens: {found.num_clips:,} clips, "
            f"{found.num_samples:,} samples, {found.num_files:,} files, {found.num_bytes:,} bytes"
        )
        for item in found.not_checked:
            print(f"not checked: {item}")
        for problem in found.problems:
            print(f"\n{problem.uri}\n  {problem.detail}\n  to do: {problem.repair}")
        print(f"\n{len(found.problems)} problems" if found.problems else "all is whole")
    if found.problems:
        sys.exit(1)


@app.command
def repair(root: str | None = None, *, preset: Preset | None = None, changes: Changes = ()) -> None:
    """Make damaged or missing token shards and clips again, and nothing else.

    A file is written only if its bytes are those that its manifest names; exit status 1 if
    something is left. Example: ursa data repair .ursa/data

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        preset: What made data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset, such as ingestion.clip_fps=12; may be given again.
    """
    from ursa.inspection.repair import repair_root

    report = repair_root(_root(root), config=_config(preset, changes))
    for item in report.repairs:
        print(f"{'repaired' if item.is_repaired else 'LEFT'}  {item.uri}\n  {item.detail}")
    print(f"{len(report.repairs) - report.num_left} repaired, {report.num_left} left")
    if report.num_left:
        sys.exit(1)


def _root(root: str | None) -> str:
    """Return the data root as runs write it into their manifests."""
    import os
    from pathlib import Path

    uri = root or os.environ.get("URSA_DATA_URI") or ".ursa/data"
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _config(preset: str | None, changes: Sequence[str]) -> "RunConfig | None":
    """Return the configuration that `--preset` and `--set` name; None if they are not given."""
    if preset is None and not changes:
        return None
    import yaml

    from ursa.config import load_config

    overrides: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        section, *names = key.strip().split(".")
        if not equals or not all([section, *names]):
            raise ConfigError(f"--set takes section.name=value, got {change!r}")
        place = overrides
        for name in (section, *names)[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {change!r}: {name} has a value already")
        try:
            place[(section, *names)[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {change!r}: {value!r} is no value") from error
    return load_config(preset or "tiny", overrides)
