"""The reference pages, made from the code at every build of the documentation."""

import inspect
import io
import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import yaml
from prefect import Flow
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.data_preparation import data_preparation
from flows.full_training import full_training
from flows.model_release import model_release
from flows.staged_training import staged_training
from tasks.settings import RuntimeSettings
from ursa import artifacts
from ursa.cli import app
from ursa.config import PRESETS, RunConfig, load_config
from ursa.data import clips, versions
from ursa.data.schema import token_schema
from ursa.decisions import Decision
from ursa.sources import committed

ROOT = Path(__file__).resolve().parents[2]
FLOWS: tuple[Flow, ...] = (full_training, data_preparation, staged_training, model_release)
MADE = "*This page is made from the code.*"
EXIT_STATUS = [
    ("0", "done"),
    ("1", "one line on the error output says what is wrong and what to do"),
    ("1", "`ursa plan`: it does not fit; `ursa doctor`, `ursa data verify`: something is wrong"),
    ("2", "the command line was not understood"),
    ("143", "a training process was told to end (SIGTERM) and has saved its state"),
]
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >="}


def pages() -> dict[str, str]:
    """Return the generated pages: Markdown by place in the site."""
    return {
        "reference/cli.md": command_line(),
        "reference/configuration.md": configuration(),
        "reference/flows.md": flows(),
        "reference/environment.md": environment(),
        "reference/schemas.md": schemas(),
        "reference/records.md": records(),
        "reference/python.md": python(),
        "decisions/index.md": decisions(),
    }


def command_line() -> str:
    """Return the page of the commands, as `--help` says."""
    made = app.generate_docs(output_format="markdown", usage_name="ursa", max_heading_level=4)
    body = made.partition("\n\n")[2]
    # what stands in angle brackets in a help text is no HTML
    body = "\n".join(re.sub(r"<(?=\w)", "&lt;", line) for line in body.splitlines())
    parts = [
        "# Command line",
        f"{MADE} `ursa COMMAND --help` says the same.",
        _rows(("Exit status", "Meaning"), EXIT_STATUS),
        body,
    ]
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """Return the page of the keys of a run."""
    presets = {name: load_config(name).model_dump(mode="json") for name in PRESETS}
    parts = [
        "# Configuration",
        f"{MADE} All keys of a preset, which `--set` of a command and `overrides` of a flow"
        " take too. An unknown key is refused. `ursa config tiny` prints a preset.",
    ]
    plain = [name for name, field in RunConfig.model_fields.items() if not _sections(field)]
    parts.append(_table(RunConfig, presets, only=plain))
    met: list[type[BaseModel]] = []
    for name, field in RunConfig.model_fields.items():
        for model in _sections(field):
            values = {key: preset[name] for key, preset in presets.items()}
            parts += list(_config_section(name, model, values, met))
    return "\n\n".join(parts) + "\n"


def flows() -> str:
    """Return the page of flows, their parameters and deployments."""
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
    parts = ["# Flows and deployments", f"{MADE} From the flows and `prefect.yaml`."]
    for flow in FLOWS:
        parts += [f"## {flow.name}", _summary(flow.fn)]
        schema = flow.parameters
        rows = []
        for name, item in schema.properties.items():
            default = "*required*" if name in schema.required else _value(item.get("default"))
            help_text = str(item.get("description", "")).strip()
            # what only another flow gives
            if name in {"context", "prepared", "trained"}:
                continue
            rows.append((f"`{name}`", default, help_text))
        parts.append(_rows(("Parameter", "Default", "Meaning"), rows))
        module = flow.fn.__module__
        for deployment in declared:
            if deployment["entrypoint"].startswith(f"{module}."):
                parts += list(_deployment(flow.name, deployment))
    return "\n\n".join(parts) + "\n"


def environment() -> str:
    """Return the page of the variables, from infra/.env.example and the settings of a run."""
    meanings = {
        f"URSA_{name.upper()}": field.description or ""
        for name, field in RuntimeSettings.model_fields.items()
    }
    parts = [
        "# Environment variables",
        f"{MADE} They say where and how a run is computed, never what comes out. Export what you"
        " change before `make up`.",
    ]
    rows: list[tuple[str, ...]] = []
    heading = ""
    for line in (ROOT / "infra" / ".env.example").read_text("utf-8").splitlines()[1:]:
        variable = re.match(r"(# )?([A-Z][A-Z0-9_]+)=(\S*)\s*(?:#\s*(.*))?$", line)
        if variable:
            off, name, value, note = variable.groups()
            meaning = meanings.pop(name, None) or note or ""
            shown = f"`{value}`" if value else ""
            rows.append((f"`{name}`", f"e.g. {shown}" if off and shown else shown, meaning))
        elif line.startswith("# "):
            heading = line[2:]
        elif not line and rows:
            parts += [f"## {heading}", _rows(("Variable", "Default", "Meaning"), rows)]
            rows = []
    parts += [f"## {heading}", _rows(("Variable", "Default", "Meaning"), rows)]
    if meanings:
        raise ValueError(f"not in infra/.env.example: {', '.join(meanings)}")
    return "\n\n".join(parts) + "\n"


def schemas() -> str:
    """Return the page of the Parquet tables."""
    tables = {
        "Token shards": token_schema(1000),
        "Clips": clips.CLIP_SCHEMA,
        "Quarantined files": clips.FAILURE_SCHEMA,
        "Selection": clips.SELECTION_SCHEMA,
        "Files of a data set version": versions.FILE_SCHEMA,
        "Changes of a data set version": versions.CHANGE_SCHEMA,
        "Files of a source": committed.SOURCE_SCHEMA,
    }
    parts = [
        "# Parquet schemas",
        f"{MADE} Version {artifacts.SCHEMA_VERSION}; a reader refuses another one. What the columns"
        " mean and where the files lie: [data format](../data-format.md).",
    ]
    for title, schema in tables.items():
        parts += [f"## {title}", _schema(schema)]
    parts.append(
        "Ids of codebooks with more than 65,536 codes are `uint32`. Every table has its version in"
        " its metadata, under `ursa.schema_version`."
    )
    return "\n\n".join(parts) + "\n"


def records() -> str:
    """Return the page of the records that steps hand on and manifests hold."""
    models = [
        item
        for item in vars(artifacts).values()
        if inspect.isclass(item)
        and issubclass(item, BaseModel)
        and item.__module__ == artifacts.__name__
    ]
    reasons = (artifacts.FailureReason, artifacts.RejectReason)
    parts = [
        "# Records and manifests",
        f"{MADE} JSON, frozen, unknown keys refused. A step's output exists when its"
        " `manifest.json` does; the manifest holds one of these records"
        " ([architecture](../architecture.md)).",
    ]
    for model in (*models, versions.DatasetVersion, Decision):
        parts += [f"## {model.__name__}", _doc(model), _table(model)]
    for reason in reasons:
        values = ", ".join(f"`{item.value}`" for item in reason)
        parts += [f"## {reason.__name__}", _doc(reason), values]
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """Return the page of the public API; mkdocstrings fills it from the docstrings."""
    public = ("ursa.generation.UrsaPipeline", "ursa.config.load_config")
    steps = (
        *("ursa.sources.listing", "ursa.ingestion", "ursa.tokenization"),
        *("ursa.training.stage", "ursa.release", "ursa.gate", "ursa.storage"),
    )
    parts = [
        "# Python",
        f"{MADE} `from ursa import UrsaPipeline, load_config` is the public interface.",
        *(f"::: {name}" for name in public),
        "# Steps",
        "What the tasks of the flows call, and tests too: a step takes and returns records.",
        *(f"::: {name}" for name in steps),
    ]
    return "\n\n".join(parts) + "\n"


def decisions() -> str:
    """Return the list of decisions."""
    files = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = [path.read_text("utf-8").partition("\n")[0].lstrip("# ") for path in files]
    lines = [f"- [{title}]({path.name})" for path, title in zip(files, titles, strict=True)]
    return "\n".join(["# Decisions", "", *lines, ""])


def _config_section(
    name: str, model: type[BaseModel], presets: Mapping[str, Any], met: list[type[BaseModel]]
) -> Iterator[str]:
    """Yield heading and table of a section, then those of what is inside it."""
    known = {key: value for key, value in presets.items() if isinstance(value, dict)}
    if model in met and not known:
        return
    met.append(model)
    yield f"## {name}"
    yield _doc(model)
    yield _table(model, known)
    for key, field in model.model_fields.items():
        for inner in _sections(field):
            values = {preset: value.get(key) for preset, value in known.items()}
            kind = inner.model_fields.get("kind")
            title = f"{name}.{key}" + (f", kind {_type(kind)}" if kind else "")
            yield from _config_section(title, inner, values, met)


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the models that a value of the field may be made of."""
    found: list[type[BaseModel]] = []
    todo = [field.annotation]
    while todo:
        item = todo.pop(0)
        if inspect.isclass(item) and issubclass(item, BaseModel):
            found.append(item)
        todo += [part for part in get_args(item) if part is not None]
    return found


def _table(
    model: type[BaseModel],
    presets: Mapping[str, Any] | None = None,
    *,
    only: list[str] | None = None,
) -> str:
    """Return the fields of a model, with the values of presets or the defaults."""
    shown = {key: value for key, value in (presets or {}).items() if isinstance(value, dict)}
    head = ("Key", "Type", *(shown or ("Default",)), "Meaning")
    rows = []
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        values = [_value(preset.get(name)) for preset in shown.values()] or [_default(field)]
        rows.append((f"`{name}`", _limited(field), *values, field.description or ""))
    return _rows(head, rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.default
    return _value(field.default_factory()) if value is PydanticUndefined else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, dict | list | tuple) and len(str(value)) > 60:
        return "below" if isinstance(value, dict) else f"{len(value)} values"
    text = " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`" if text else "empty"


def _limited(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in SIGNS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field), *limits])


def _type(field: FieldInfo) -> str:
    return _spelled(field.annotation)


def _spelled(kind: Any) -> str:
    """Return a type as a reader of JSON calls it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _spelled(inner[0])
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in inner)
    if origin in {Union, types.UnionType}:
        return " or ".join(_spelled(item) for item in inner)
    if origin in {tuple, list}:
        several = dict.fromkeys(_spelled(item) for item in inner if item is not Ellipsis)
        return f"list of {', '.join(several)}"
    if origin in {dict, Mapping}:
        return f"map of {_spelled(inner[1])}"
    names = {
        type(None): "null",
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
    }
    return names.get(kind) or getattr(kind, "__name__", str(kind))


def _schema(schema: pa.Schema) -> str:
    rows = [
        (f"`{field.name}`", f"`{field.type}`", "yes" if field.nullable else "no")
        for field in schema
    ]
    return _rows(("Column", "Type", "May be null"), rows)


def _deployment(flow_name: str, deployment: dict[str, Any]) -> Iterator[str]:
    yield f"### {flow_name}/{deployment['name']}"
    yield re.sub(r"`docs/(\S+)`", r"[\1](../\1)", " ".join(deployment["description"].split()))
    rows = [(f"`{key}`", _value(value)) for key, value in deployment["parameters"].items()]
    for item in deployment.get("schedules", []):
        state = "on" if item["active"] else "off until somebody turns it on"
        rows.append(("schedule", f"`{item['cron']}` {item['timezone']}, {state}"))
    if "concurrency_limit" in deployment:
        limit = deployment["concurrency_limit"]
        rows.append(("at once", f"{limit['limit']}, `{limit['collision_strategy']}`"))
    yield _rows(("Parameter", "Value"), rows)


def _summary(item: Any) -> str:
    """Return a docstring up to its first section."""
    text = inspect.getdoc(item) or ""
    return re.split(r"\n(?:Args|Returns|Raises|References):", text)[0].strip()


def _doc(model: type) -> str:
    return _escaped(_summary(model)) if "__doc__" in vars(model) else ""


def _rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    text.write(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    for row in rows:
        cells = (_escaped(" ".join(cell.split())).replace("|", "\\|") for cell in row)
        text.write(f"| {' | '.join(cells)} |\n")
    return text.getvalue().rstrip()


def _escaped(text: str) -> str:
    """Return text with the angle brackets of placeholders, outside of code, as characters."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)
