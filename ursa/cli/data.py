"""`ursa data`: verify, repair, count and show the data of runs, and try other thresholds."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from ursa.cli.lines import print_lines
from ursa.cli.models import without_secret
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
        media: Read all clip files, models and checkpoints too.
        preset: What made data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset, such as tokenization.fps=12; may be given again.
        as_json: Print JSON.
    """
    from ursa.inspection.verify import verify_root

    found = verify_root(root_uri(root), with_media=media, config=_config(preset, changes))
    if as_json:
        print(found.model_dump_json(indent=1, ensure_ascii=True))
    else:
        print(
            f"checked {found.num_clip_sets} sets of clips, {found.num_selections} selections, "
            f"{found.num_token_sets} sets of tokens, {found.num_versions} versions: "
            f"{found.num_clips:,} clips, {found.num_samples:,} samples, {found.num_records:,} "
            f"records, {found.num_files:,} files, {found.num_bytes:,} bytes"
        )
        for item in found.not_checked:
            print_lines(f"not checked: {item}")
        for problem in found.problems:
            print_lines("", problem.uri, f"  {problem.detail}", f"  to do: {problem.repair}")
        print(f"\n{len(found.problems)} problems" if found.problems else "all is whole")
    if found.problems:
        sys.exit(1)


@app.command
def repair(root: str | None = None, *, preset: Preset | None = None, changes: Changes = ()) -> None:
    """Make damaged or missing token shards, clips and tables of versions again.

    A file is written only if its bytes are those that its manifest names. Damaged records of files
    and annotations are removed: the next run makes them again. Exit status 1 if something is left.
    Example: ursa data repair .ursa/data

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        preset: What made data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset, such as tokenization.fps=12; may be given again.
    """
    from ursa.inspection.repair import repair_root

    report = repair_root(root_uri(root), config=_config(preset, changes))
    for item in report.repairs:
        print_lines(f"{'repaired' if item.is_repaired else 'LEFT'}  {item.uri}", f"  {item.detail}")
    print(f"{len(report.repairs) - report.num_left} repaired, {report.num_left} left")
    if report.num_left:
        sys.exit(1)


@app.command
def stats(
    root: str | None = None,
    *,
    selection: str | None = None,
    source: str | None = None,
    preset: Preset | None = None,
    changes: Changes = (),
    as_json: AsJson = False,
) -> None:
    """Count files, clips, seconds, reasons, sizes, scores, tokens, bytes, captions.

    Example: ursa data stats .ursa/data --json

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        selection: Manifest or folder of a selection; the newest.
        source: Of the data set, where the root holds several: its newest version.
        preset: What made token data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset, such as tokenization.fps=12; may be given again.
        as_json: Print JSON; durations in seconds, sizes in bytes.
    """
    from ursa.inspection.stats import data_stats

    selection = _selection_uri(root, selection, source)
    found = data_stats(root_uri(root), selection_uri=selection, config=_config(preset, changes))
    if as_json:
        print(found.model_dump_json(indent=1, ensure_ascii=True))
    else:
        from ursa.cli.data_tables import print_stats

        print_stats(found)


@app.command
def sample(
    root: str | None = None,
    *,
    out: Path,
    kept: Flag = False,
    rejected: Flag = False,
    reason: str | None = None,
    number: int = 8,
    strips: Flag = False,
    selection: str | None = None,
) -> None:
    """Copy example clips with their scores and reasons to look at.

    Example: ursa data sample --rejected --reason blurred --number 20 --out blurred/

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        out: Folder for the clips and examples.json; made if missing.
        kept: Kept clips; with neither this nor --rejected, both.
        rejected: Rejected clips.
        reason: Clips rejected for this reason.
        number: How many at most, evenly spread over all of the kind.
        strips: Write strips of frames as PNG instead of clips.
        selection: Manifest or folder of a selection; the newest.
    """
    if kept and reason is not None:
        raise ConfigError("kept clips have no reason; leave out --kept or --reason")
    from ursa.inspection.examples import choose_examples, write_examples
    from ursa.inspection.root import load_selection

    chosen = None if kept == rejected else kept
    record = load_selection(root_uri(root), selection)
    examples = choose_examples(record, number, kept=chosen, reason=reason)
    for path in write_examples(examples, out, as_strips=strips):
        print_lines(path)
    if not examples:
        print("no clip was rejected" if rejected and reason is None else "no clip of this kind")


@app.command(name="what-if")
def what_if(
    root: str | None = None,
    *,
    recipe: str | None = None,
    changes: Changes = (),
    preset: Preset | None = None,
    selection: str | None = None,
    source: str | None = None,
    list_clips: Annotated[bool, Parameter(name="--list", negative=())] = False,
) -> None:
    """Show what other thresholds would keep, from stored scores; nothing is decoded or written.

    Example: ursa data what-if --recipe ursa-basic --set selection.min_sharpness=30 --list

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        recipe: Rules to try beside the others; see `ursa data recipes`.
        changes: Thresholds to try, such as selection.min_sharpness=30; may be given again.
        preset: Where thresholds that are not set come from; else the selection itself.
        selection: Manifest or folder of the selection to compare with; the newest.
        source: Of the data set, where the root holds several: its newest version.
        list_clips: Name the clips that make the difference.
    """
    from ursa.cli.data_tables import print_what_if
    from ursa.inspection.root import load_selection
    from ursa.inspection.what_if import what_if as judge_again

    base: dict[str, Any] = {}
    given = parse_changes((*changes, *([f"selection.recipe={recipe}"] if recipe else [])))
    if others := sorted(set(given) - {"selection"}):
        raise ConfigError(
            f"--set {others[0]}...: stored scores are judged again, so only `selection` can be "
            "tried; other settings need a run"
        )
    if preset is None:
        _load("tiny", given)  # a mistake is named before anything is read
    selection = _selection_uri(root, selection, source)
    if preset is None:
        record = load_selection(root_uri(root), selection)
        selection = record.manifest_uri
        base = {"selection": record.config.model_dump(mode="json") | given.pop("selection", {})}
    config = _load(preset or "tiny", base | given)
    result = judge_again(root_uri(root), config, selection_uri=selection)
    print_what_if(result, list_clips=list_clips)


@app.command
def recipes(*, as_json: AsJson = False) -> None:
    """List the recipes of `selection.recipe`: what they need, their rules, their source.

    Example: ursa data recipes

    Args:
        as_json: Print JSON.
    """
    from ursa.video.recipes import load_recipes

    found = load_recipes()
    if as_json:
        import json

        print(json.dumps([item.model_dump(mode="json") for item in found], indent=1))
        return
    from ursa.cli.data_tables import print_recipes

    print_recipes(found)


@app.command
def card(
    root: str | None = None,
    *,
    out: Path,
    selection: str | None = None,
    preset: Preset | None = None,
    changes: Changes = (),
) -> None:
    """Write a data card: one HTML file with funnel, scores, sizes, captions and examples.

    Example: ursa data card .ursa/data --out card.html

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        out: The file, .html.
        selection: Manifest or folder of a selection; the newest.
        preset: What made token data sets without a recipe; else the presets are tried.
        changes: Overrides of the preset; may be given again.
    """
    if out.suffix.lower() != ".html" or not out.parent.is_dir():
        raise ConfigError(f"--out must be a .html in a directory that exists, got {out}")
    from ursa.inspection.card import data_card

    config = _config(preset, changes)
    out.write_text(data_card(root_uri(root), selection_uri=selection, config=config), "utf-8")
    print(out)


def _selection_uri(root: str | None, selection: str | None, source: str | None) -> str | None:
    """Return the selection that `--selection` or `--source` names; None is the newest."""
    if source is None:
        return selection
    if selection is not None:
        raise ConfigError("--selection names one already; leave out --source or --selection")
    from ursa.cli.data_versions import choose_version
    from ursa.data.versions import list_versions
    from ursa.inspection.root import SELECTIONS
    from ursa.storage import join

    place = root_uri(root)
    version = choose_version(list_versions(place), None, source)
    # not where it says that it is: the root may have been moved
    return join(place, *SELECTIONS, version.selection.manifest_uri.split("/")[-2])


def root_uri(root: str | None) -> str:
    """Return the data root as runs write it into their manifests.

    Args:
        root: What was given; None takes URSA_DATA_URI, or .ursa/data.

    Raises:
        ConfigError: If the address holds a secret; does not show it.
    """
    import os

    from ursa.storage import absolute_uri

    given = root or os.environ.get("URSA_DATA_URI") or ".ursa/data"
    return absolute_uri(without_secret(given, "of the data root"))


def _config(preset: str | None, changes: Sequence[str]) -> "RunConfig | None":
    """Return the configuration that `--preset` and `--set` name; None if they are not given."""
    if preset is None and not changes:
        return None
    return load_preset(preset or "tiny", changes)


def load_preset(preset: str, changes: Sequence[str]) -> "RunConfig":
    """Return a preset with the changes that `--set` names.

    Args:
        preset: Its name.
        changes: Such as selection.min_sharpness=30.

    Raises:
        ConfigError: If a change is none, names no setting, or has a value that is not allowed.
    """
    return _load(preset, parse_changes(changes))


def _load(preset: str, overrides: Mapping[str, Any]) -> "RunConfig":
    """Return a preset with some values replaced."""
    from ursa.config import load_config

    return load_config(preset, overrides)


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Return the values that `--set` names, nested by section."""
    import yaml

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
    return overrides
