"""Tasks: register the evaluated model as a version; find what is registered already."""

import shlex

from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks import model_registry, releases, reports, tracking
from tasks.context import RunContext, TrainedModel, lacks_for_now
from tasks.evaluation import GALLERY
from tasks.options import announce, step
from tasks.retraining import NETWORK_TAG, network_fingerprint, started_from
from ursa import storage
from ursa.artifacts import EvalReport, ModelVersion
from ursa.data.versions import DatasetVersion
from ursa.texts import markdown_code, markdown_text

CARD = "model_card.md"
REPORT = "report.html"
IS_NEW_TAG = "ursa.is_new"
"""Tag of a run that was finished: whether it made a version."""
RECORDS = {
    "data set version": "ursa.dataset_version",
    "clips": "ursa.clips",
    "selection": "ursa.selection",
    "tokens": "ursa.tokens",
    "evaluation": "ursa.evaluation",
}
"""Tags of a version that name manifests."""


@step(run_name="look for a registered version")
def find_version(context: RunContext) -> ModelVersion | None:
    """Return the version that this run has registered before, if the run was finished.

    Args:
        context: The run.

    Returns:
        The version, or None.

    Raises:
        ServiceError: If the tracking server does not answer.
    """
    found = model_registry.find_version(
        context.run.tracking_uri,
        context.config.release.model_name,
        model_registry.FINGERPRINT_TAG,
        context.release_fingerprint,
    )
    # card and report come after the registration: what a kill has left is finished
    is_finished = found is not None and IS_NEW_TAG in tracking.run_tags(context.run)
    return found if is_finished else None


@step(run_name="register model")
def register_model(context: RunContext, trained: TrainedModel, report: EvalReport) -> ModelVersion:
    """See `tasks.model_registry.register_version`; what the gate says is put on record.

    Alias challenger, and champion if the gate holds.

    Args:
        context: The run.
        trained: The outcome of the training part.
        report: The evaluation of the exported model.

    Returns:
        The version, with its best alias.

    Raises:
        RegistrationError: If the stored files differ from the exported ones.
        ServiceError: If the tracking server does not answer.
        StorageError: If the store refuses or does not answer.
    """
    datasets = trained.request.datasets
    version = model_registry.register_version(
        context.run,
        report,
        context.config,
        {
            # a run that lacks files only for now is not found again: the next one looks at them
            model_registry.FINGERPRINT_TAG: (
                model_registry.UNFINISHED if lacks_for_now(trained) else context.release_fingerprint
            ),
            "ursa.source_uri": context.source_uri,
            "ursa.source_fingerprint": context.source_fingerprint,
            "ursa.preset": context.preset,
            "ursa.clips": trained.selection.clips.manifest_uri,
            "ursa.selection": trained.selection.manifest_uri,
            "ursa.dataset_version": trained.version_uri,
            "ursa.tokens": datasets.manifest_uri,
            "ursa.tokens_fingerprint": datasets.fingerprint,
            "ursa.checkpoint": trained.checkpoint.uri,
            NETWORK_TAG: network_fingerprint(
                context.config, trained.request.visual_tokenizer, trained.request.text_tokenizer
            ),
            **started_from(context, trained),
            **tracking.source_version(),
        },
        root_uri=context.data_uri,
        decided_by=reports.decided_by(),
    )
    tracking.tag_run(context.run, sample_tags(context, report))
    _log_card(context, trained, report, version)
    announce("registered %s as %s", version.model_uri, version.alias)
    return version


def _log_card(
    context: RunContext, trained: TrainedModel, report: EvalReport, version: ModelVersion
) -> None:
    """Write the model card beside the run; none if there is no data set version (any more)."""
    from ursa.inspection.model_card import model_card  # noqa: PLC0415  (matplotlib: a second)

    has_version = bool(trained.version_uri)
    data = storage.load_record(trained.version_uri, DatasetVersion) if has_version else None
    if data is None:
        return
    card = model_card(
        report,
        trained.request,
        trained.stages or [trained.checkpoint],
        data,
        name=f"{version.name} version {version.version}",
        origin=origin(context, trained, version),
    )
    tracking.log_text(context.run, card, CARD)


def origin(context: RunContext, trained: TrainedModel, version: ModelVersion) -> dict[str, str]:
    """Return where a version is from, fact by fact.

    Args:
        context: The run.
        trained: The outcome of the training part.
        version: The version.
    """
    return {
        "registered version": version.model_uri,
        "MLflow run": context.run.url,
        "source": context.source_uri,
        "preset": context.preset,
        "data set version": trained.version_uri,
        "checkpoint": trained.checkpoint.uri,
        "configuration and source": context.fingerprint,
        **tracking.source_version(),
        **started_from(context, trained),
    }


@step(run_name="write the report")
def report_run(
    context: RunContext, trained: TrainedModel, report: EvalReport, version: ModelVersion
) -> None:
    """See `ursa.inspection.run_report.run_report`; the page goes to the tracking server.

    Args:
        context: The run.
        trained: The outcome of the training part.
        report: The evaluation of the exported model.
        version: The version that was registered.

    Raises:
        ServiceError: If the tracking server does not answer.
        UrsaError: What that function raises.
    """
    from ursa.inspection.run_report import CURVES, RunReport, StageRun, run_report  # noqa: PLC0415

    has_version = bool(trained.version_uri)
    pages = run_pages(context, version)
    page = run_report(
        RunReport(
            title=f"{version.name} version {version.version}",
            links={"MLflow run": context.run.url, **pages},
            facts=origin(context, trained, version),
            report=report,
            request=trained.request,
            version=storage.load_record(trained.version_uri, DatasetVersion)
            if has_version
            else None,
            steps=[StageRun(*item) for item in tracking.step_curves(context.run, CURVES)],
        )
    )
    tracking.log_text(context.run, page, REPORT)
    reports.link(
        "run-report",
        context.run.page(REPORT),
        f"report of {version.name} version {version.version}",
        "Funnel, schedule, curves, samples, tokens, reconstructions, lineage and cost on one page.",
    )


def sample_tags(context: RunContext, report: EvalReport) -> dict[str, str]:
    """Return where a generated clip lies and the command that makes it again.

    Args:
        context: The run.
        report: The evaluation with its samples.

    Returns:
        `ursa.samples_uri`, `ursa.model_directory` and, if there are samples, `ursa.sample` and
        `ursa.generate_command`.

    Raises:
        FileNotFoundError: If the list of prompts is gone.
        StorageError: If the store refuses or does not answer.
    """
    from ursa.data.addresses import address_seed  # noqa: PLC0415  (torch: seconds)

    tags = {
        "ursa.samples_uri": report.samples_uri,
        "ursa.model_directory": report.model.directory_uri,
    }
    rows = storage.read_bytes(storage.join(report.samples_uri, "prompts.tsv")).decode("utf-8")
    for row in rows.splitlines():
        name, _, prompt = row.partition("\t")
        if not name.startswith("t2v"):
            continue
        seed = address_seed(context.config.seed, "sample", "t2v", prompt)
        model = shlex.quote(report.model.directory_uri)
        tags["ursa.sample"] = storage.join(report.samples_uri, f"{name}.mp4")
        tags["ursa.generate_command"] = (
            f"ursa generate {shlex.quote(prompt)} --model {model} --seed {seed} --out clip.mp4"
        )
        break
    return tags


def run_pages(context: RunContext, version: ModelVersion) -> dict[str, str]:
    """Return the pages where a run is to be seen, by name.

    Args:
        context: The run.
        version: The version that was registered or found.
    """
    run = context.run
    pages = {
        f"{version.name} version {version.version}": tracking.version_page(
            run.tracking_uri, version
        )
    }
    for name, path in (("report", REPORT), ("samples", GALLERY), ("model card", CARD)):
        if tracking.has_artifact(run, path):
            pages[name] = run.page(path)
    if flow_run := reports.flow_run_tags().get("prefect.flow_run_url"):
        pages["Prefect run"] = flow_run
    return pages


def run_note(context: RunContext, version: ModelVersion) -> str:
    """Return the description of the run that MLflow shows first, in Markdown: where to go on.

    Args:
        context: The run.
        version: The version that was registered or found.
    """
    run = context.run
    pages = run_pages(context, version)
    found = model_registry.registered_version(run.tracking_uri, version.name, version.version)
    records = {
        label: found.tags[tag]
        for label, tag in RECORDS.items()
        if found is not None and found.tags.get(tag)
    }
    links = " · ".join(f"[{markdown_text(text)}]({page})" for text, page in pages.items())
    lines = [f"- {label}: {markdown_code(uri)}" for label, uri in records.items()]
    return "\n".join([links, "", *lines])


def _title(context: RunContext, version: ModelVersion) -> str:
    """Return what came of a run in one line: a refusal must not look like a success."""
    done = f"registered {version.name} version {version.version}"
    if not version.is_new:
        done = f"nothing changed: version {version.version} is up to date"
    uri = context.run.tracking_uri
    found = model_registry.registered_version(uri, version.name, version.version)
    tags = {} if found is None else found.tags
    records_uri = tags.get("ursa.dataset_version")
    if records_uri and not storage.is_below(records_uri, context.data_uri):
        done = f"{done} (its data are not at {context.data_uri}: {records_uri})"
    if tags.get("ursa.gate_passed") == "false":
        with tracking.service(uri) as client:
            champion = releases.aliases(client, version.name).get(releases.CHAMPION)
        left = f"champion is still version {champion}" if champion else "there is no champion"
        return f"{done}, which the gate refused ({left}): {tags.get('ursa.failed_gates', '')}"
    return f"{done} as {version.alias}" if version.alias and version.is_new else done


def finish_run(context: RunContext, version: ModelVersion) -> State[ModelVersion]:
    """Note the outcome in the tracking run, write the summary and name the final state.

    A run that has found everything done leaves the tags of the run that has made it.

    Args:
        context: The run.
        version: The version that was registered or found.

    Returns:
        Final state of the flow, named "Completed" or "NothingChanged".

    Raises:
        ServiceError: If the tracking server does not answer.
    """
    url = tracking.version_page(context.run.tracking_uri, version)
    pages = run_pages(context, version)
    tags = {
        "ursa.model_name": version.name,
        "ursa.model_version": version.version,
        "ursa.alias": version.alias or "",
    }
    if version.is_new:  # made by this flow run and this code
        tags |= {**reports.flow_run_tags(), **tracking.source_version()}
    if version.is_new or IS_NEW_TAG not in tracking.run_tags(context.run):
        tags[IS_NEW_TAG] = str(version.is_new).lower()
        tags[tracking.NOTE] = run_note(context, version)
    tracking.tag_run(context.run, tags)
    reports.model_version(version, url)
    name = markdown_text(version.name)
    title = _title(context, version)
    reports.run_summary(
        title,
        [
            ("model version", f"[{name} {version.version}]({url}), {version.alias}"),
            ("MLflow run", f"[{context.run.run_id}]({context.run.url})"),
            ("pages", reports.artifact_links("data-funnel", "eval-report", "sample-grid")),
            (
                "in MLflow",
                " · ".join(f"[{markdown_text(text)}]({page})" for text, page in pages.items()),
            ),
            ("source", markdown_code(context.source_uri)),
            ("preset", context.preset),
            ("data", markdown_code(context.data_uri)),
            ("fingerprint of the run", f"`{context.fingerprint[:16]}`"),
            ("next", "`make run` again after adding videos, or with another PRESET"),
        ],
    )
    state_name = "Completed" if version.is_new else "NothingChanged"
    state: State[ModelVersion] = Completed(message=title, name=state_name)
    return state
