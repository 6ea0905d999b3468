"""`ursa evaluate`: any model on any version of a data set, with intervals."""

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ursa.cli.data import AsJson, Changes, Preset, parse_changes, root_uri
from ursa.cli.data_versions import choose_version
from ursa.cli.lines import print_lines
from ursa.cli.models import check_device, check_place, model_directory
from ursa.errors import ConfigError
from ursa.texts import PrintableRecords, printable

if TYPE_CHECKING:
    from ursa.artifacts import Measure, Measurements
    from ursa.evaluation.measures import Difference
    from ursa.evaluation.models import ModelMeasurements

Flag = Annotated[bool, Parameter(negative=())]


def evaluate(
    model: str,
    root: str | None = None,
    *,
    data_version: int | None = None,
    source: str | None = None,
    preset: Preset = "tiny",
    changes: Changes = (),
    out: Path | None = None,
    against: Path | None = None,
    device: str = "cpu",
    quiet: Annotated[bool, Parameter(alias="-q", negative=())] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model: losses, reconstruction, drawn clips, asked motion, copies of training clips.

    Example: ursa evaluate models:/ursa@champion .ursa/data --out champion.json

    Example: ursa evaluate models:/ursa@challenger --against champion.json

    Args:
        model: A model directory, a name on the hub, models:/NAME@ALIAS, or the folder of a
            checkpoint, such as .ursa/data/checkpoints/video_pretrain/.../step-00000200.ab12cd34.
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        data_version: Number of the data set version (`ursa data versions`); the newest.
        source: Of the data set, where the root holds several.
        preset: How much is measured; of a checkpoint also network, path and sampling.
        changes: Overrides, such as evaluation.clips.num_windows=32; may be given again.
        out: Where to write the measurements, .json.
        against: Measurements of another model on the same version of the data with the same
            settings, as --out wrote them: the two are compared case by case.
        device: Where to run, such as cpu or cuda.
        quiet: Say nothing while it is measured.
        as_json: Print JSON.

    Raises:
        UrsaError: If the model or the data cannot be read.
    """
    if out is not None:
        if not out.parent.is_dir():
            raise ConfigError(f"--out: there is no directory {out.parent}; make it first")
        if out.is_dir():
            raise ConfigError(f"--out: {out} is a directory; give the name of a .json file")
    other = None if against is None else _read(against)
    check_place(model)
    from ursa.data.versions import list_versions

    versions = list_versions(root_uri(root))
    version = choose_version(versions, data_version, source, option="--data-version")
    from ursa.evaluation.models import measure_model, open_model, version_conditions, version_config

    config = version_config(version, preset, parse_changes(changes))
    if other is not None:
        own = [item for item in versions if item.source_uri == version.source_uri]
        numbers = {item.number: version_conditions(item, config) for item in own}
        check_conditions(other, numbers, version.number, version.source_uri)
    check_device(device)
    with model_directory(model) as directory:
        # a path would lose a slash of s3://
        place = model if "://" in model else directory
        pipeline = open_model(place, version, config, device=device)
    pipeline.set_progress_bar_config(disable=True)
    with contextlib.nullcontext() if quiet else _progress():
        found = measure_model(pipeline, version, config, name=model)
    if out is not None:
        out.write_text(found.model_dump_json(indent=1), "utf-8")
    if as_json:
        _print_json(found, other)
        return
    print_measures(found.measurements)
    for reason in found.not_measured:
        sys.stderr.write(f"not measured: {printable(reason)}\n")
    if other is not None:
        _print_differences(found, other)
    if out is not None:
        print(f"written to {out}")


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Write what is being measured to the terminal."""
    logger, handler = logging.getLogger("ursa.evaluation"), logging.StreamHandler()
    handler.addFilter(PrintableRecords())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _read(path: Path) -> "ModelMeasurements":
    from pydantic import ValidationError

    from ursa.evaluation.models import ModelMeasurements

    try:
        return ModelMeasurements.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--against: {path} cannot be read ({error})") from error
    except ValidationError as error:
        raise ConfigError(
            f"--against: {path} holds no measurements; `ursa evaluate --out` writes them"
        ) from error


def check_conditions(
    other: "ModelMeasurements",
    conditions: Mapping[int, Mapping[str, str]],
    number: int,
    source: str,
) -> None:
    """Refuse measurements that were made otherwise than those to come.

    Args:
        other: Of another model.
        conditions: Of each version of the data set, by number, as
            `ursa.evaluation.models.version_conditions` returns them.
        number: Of the version that is to be measured.
        source: Its source.

    Raises:
        ConfigError: If they differ.
    """
    from ursa.evaluation.models import DATA, SETTINGS

    here, there = conditions[number], other.conditions
    # versions may differ in what is not measured
    numbers = {own[DATA]: item for item, own in conditions.items()} | {here[DATA]: number}
    unlike = [name for name, value in here.items() if there.get(name) != value]
    if not unlike:
        return

    def said(name: str, value: str | None) -> str:
        if value is None:
            return "unknown"
        if name != DATA:
            return value
        version = numbers.get(value)
        other_data = f"another source, or a version that is gone ({value})"
        return other_data if version is None else f"version {version} ({value})"

    differing = [
        f"{name} is {said(name, here[name])} here and {said(name, there.get(name))} there"
        for name in unlike
    ]
    advice = (
        f"measure that model on version {number} with the settings of this call, `ursa evaluate "
        f"{shlex.quote(other.model)} ... --source {shlex.quote(source)} --data-version {number} "
        "--out ...`"
    )
    options = [
        f"--set {shlex.quote(f'{name}={there[name]}')}"
        for name in SETTINGS
        if name in unlike and name in there
    ]
    if there.get(DATA) in numbers and DATA in unlike:
        options.insert(0, f"--data-version {numbers[there[DATA]]}")
    if len(options) == len(unlike):
        advice += f", or give {' '.join(options)} here"
    raise ConfigError(
        f"--against: {other.model} was measured otherwise (its data: {other.data_version_uri}), "
        f"and nothing can be compared: {'; '.join(differing)}; {advice}"
    )


def print_measures(found: "Measurements") -> None:
    """Print values, intervals and what they are over.

    Args:
        found: What was measured.
    """
    from ursa.bootstrap import describe_units

    print(f"{'metric':36} {'value':>9}  95 % interval         unit, which way is better")
    for item in found.measures:
        better = f", {item.better} is better" if item.better else ""
        print_lines(
            f"{item.metric:36} {item.value:9.4g}  {_interval(item):20}  {item.unit}{better}"
        )
    for group in found.cases:
        number = len(set(group.units))
        drawn = describe_units(group.unit, number) if group.unit else "no interval"
        print_lines(f"{group.name}: {len(group.cases)} cases, {drawn}")


def _compare(
    found: "ModelMeasurements", other: "ModelMeasurements"
) -> tuple[list["Difference"], list[str]]:
    """Return the differences of two models, and what is not compared, with the reason."""
    from ursa.evaluation.measures import differences, left_out

    rows = differences(found.measurements, other.measurements)
    reasons = [
        f"{', '.join(metrics)} ({reason})"
        for reason, metrics in left_out(found.measurements, other.measurements).items()
    ]
    if not rows:
        raise ConfigError(
            f"--against: nothing of {other.model} can be compared: {'; '.join(reasons) or 'empty'}"
        )
    return rows, reasons


def _print_json(found: "ModelMeasurements", other: "ModelMeasurements | None") -> None:
    answer = found.model_dump(mode="json")
    if other is not None:
        rows, not_compared = _compare(found, other)
        answer["against"] = {
            "model": other.model,
            "differences": [row._asdict() for row in rows],
            "not_compared": not_compared,
        }
    print(json.dumps(answer, indent=1))


def _print_differences(found: "ModelMeasurements", other: "ModelMeasurements") -> None:
    rows, reasons = _compare(found, other)
    print_lines("", f"{found.model} less {other.model}, case by case")
    for row in rows:
        print_lines(f"{row.metric:36} {row.value:+9.4g}  {_interval(row):20}  {row.verdict}")
    if reasons:
        sys.stderr.write(f"not compared: {printable('; '.join(reasons))}\n")


def _interval(item: "Measure | Difference") -> str:
    if item.low is None or item.high is None:
        return ""
    return f"{item.low:.4g} to {item.high:.4g}"
