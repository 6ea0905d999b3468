"""Versions of registered models in MLflow: found by what they are, registered whole or not at all.

Who is champion is decided in `tasks.releases`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import releases
from tasks.tracking import TrackedRun, service
from ursa import storage
from ursa.artifacts import EvalReport, ExportedModel, ModelVersion
from ursa.config import RunConfig
from ursa.errors import ConfigError, RegistrationError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ALL_GONE = "all of its files are gone"
"""Of one model that is damage; of all of them, more likely a store that is away."""
FINGERPRINT_TAG = "ursa.run_fingerprint"
"""Tag of a version by which the run that made it finds it again."""
UNFINISHED = "unfinished"
"""Stands in that tag where files were missing only for now, so that the next run looks again."""


class RegisteredVersion(NamedTuple):
    """A version in the registry.

    Attributes:
        name: Name of the registered model.
        version: Its number.
        tags: Its tags.
    """

    name: str
    version: str
    tags: dict[str, str]


def find_version(tracking_uri: str, name: str, tag: str, value: str) -> ModelVersion | None:
    """Return the newest version with a tag, if it was registered as a whole.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        tag: Name of the tag.
        value: Its value.

    Returns:
        The version with its best alias, or None.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        found = _versions(client, name, tag, value)
        if not found or releases.WHOLE_TAG not in found[-1].tags:
            return None
        return _version_record(client.get_model_version(name, found[-1].version), is_new=False)


def newest_version_tags(
    tracking_uri: str, name: str, *, source_uri: str | None = None
) -> dict[str, str]:
    """Return the tags of the newest version of a model; empty when there is none.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        source_uri: Only versions that were trained on this source count.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        found = [
            item
            for item in client.search_model_versions(f"name = '{name}'")
            if releases.WHOLE_TAG in item.tags  # others were left by a run that was killed
            and releases.DAMAGED_TAG not in item.tags
            and source_uri in {None, item.tags.get("ursa.source_uri")}
        ]
        newest = max(found, key=lambda item: int(item.version), default=None)
        return dict(newest.tags) if newest else {}


def registered_directory(tracking_uri: str, model_uri: str) -> str:
    """Return where the model directory of a registered version is.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Returns:
        URI of the directory that the version was made from.

    Raises:
        ConfigError: If there is no such version, or it was not registered by this pipeline.
        ServiceError: If the server does not answer.
    """
    name, _, rest = model_uri.removeprefix(releases.REGISTRY_SCHEME).partition("@")
    alias: str | None = rest
    if not rest:
        (name, _, rest), alias = name.partition("/"), None
    if not name or not rest:
        raise ConfigError(
            f"{model_uri!r} names no version; expected models:/<name>@champion or "
            "models:/<name>/<version>"
        )
    with service(tracking_uri) as client:
        found = [
            item
            for item in client.search_model_versions(f"name = '{name}'")
            if (
                rest in _aliases(client, name, item.version) if alias else str(item.version) == rest
            )
        ]
    if not found:
        raise ConfigError(
            f"no model {model_uri} in the registry at {tracking_uri}; train and register one "
            "first, or give a directory"
        )
    directory = found[0].tags.get("ursa.model_directory")
    if directory is None:
        raise ConfigError(
            f"{model_uri} has no tag ursa.model_directory: this pipeline did not register it; "
            "give its directory"
        )
    return str(directory)


def champion_version(
    tracking_uri: str, name: str, *, root_uri: str, decided_by: str
) -> RegisteredVersion | None:
    """Return the version that is champion; None if there is none.

    A decision that a kill interrupted is carried out first, and a champion that was deleted gives
    way to the one before it.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        root_uri: The data root, where decisions are on record.
        decided_by: See `ursa.decisions.who`.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        ServiceError: If the server does not answer.
        StorageError: If the store refuses or does not answer.
    """
    with service(tracking_uri) as client:
        if not client.search_registered_models(f"name = '{name}'"):
            return None
        releases.settle(releases.Registry(client, name, root_uri, decided_by))
        version = releases.aliases(client, name).get(releases.CHAMPION)
    return None if version is None else registered_version(tracking_uri, name, version)


def registered_version(tracking_uri: str, name: str, version: str) -> RegisteredVersion | None:
    """Return a version; None if there is no such one.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        version: Its number.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        for item in client.search_model_versions(f"name = '{name}'"):
            if str(item.version) == version:
                return RegisteredVersion(name, version, dict(item.tags))
    return None


def taken_down(tracking_uri: str, version: RegisteredVersion) -> str | None:
    """See `tasks.releases.taken_down`.

    Args:
        tracking_uri: Address of the tracking server.
        version: The version.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        return releases.taken_down(client, version)


def trained_on(tracking_uri: str, model_uri: str) -> tuple[str | None, ...]:
    """Return the token data sets of a version and of those that it went on from, the last first.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: `models:/<name>/<version>`.

    Returns:
        Their manifests; None for a version that is gone or says nothing.

    Raises:
        ServiceError: If the server does not answer.
    """
    found: list[str | None] = []
    seen: set[str] = set()
    while model_uri and model_uri not in seen:
        seen.add(model_uri)
        name, _, number = model_uri.removeprefix(releases.REGISTRY_SCHEME).rpartition("/")
        version = registered_version(tracking_uri, name, number)
        tags = {} if version is None else version.tags
        found.append(tags.get("ursa.tokens"))
        model_uri = tags.get(releases.STARTED_FROM_TAG, "")
    return tuple(found)


@contextlib.contextmanager
def model_files(tracking_uri: str, name: str, version: str) -> Iterator[Path]:
    """Yield the model directory of a version, downloaded; it is removed afterwards.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        version: Its number.

    Yields:
        The directory.

    Raises:
        ServiceError: If the server does not answer.
        RegistrationError: If the version holds no model directory.
    """
    model_uri = f"{releases.REGISTRY_SCHEME}{name}/{version}"
    with storage.scratch_directory("model") as folder:
        root = _download(tracking_uri, model_uri, folder)
        found = sorted(root.glob("artifacts/*/model_index.json"))
        if not found:
            raise RegistrationError(
                f"{model_uri} holds no model directory: this pipeline did not register it, or its "
                f"files are gone; roll back with {releases.models_command(name, 'rollback')}"
            )
        yield found[0].parent


def register_version(
    run: TrackedRun,
    report: EvalReport,
    config: RunConfig,
    tags: Mapping[str, str],
    *,
    root_uri: str,
    decided_by: str,
) -> ModelVersion:
    """Register an evaluated model as a version, whole or not at all.

    A version that holds the same files already is returned as it is. Else: log the model, download
    it and compare every file, create the version with its tags, then set the aliases. What the gate
    says is put on record (`ursa.decisions`) before it is carried out.

    Args:
        run: The run that the version belongs to.
        report: The evaluation, with the model.
        config: The configuration of the run; becomes metadata of the model.
        tags: Lineage: manifest addresses and fingerprints.
        root_uri: The data root, where decisions are on record.
        decided_by: See `ursa.decisions.who`.

    Returns:
        The version, with its best alias.

    Raises:
        RegistrationError: If the stored files differ from the exported ones.
        ServiceError: If the server does not answer.
    """
    from ursa.gate import comparison_text  # noqa: PLC0415  (torch: seconds)

    name = config.release.model_name
    key = report.model.content_key
    all_tags = {
        **tags,
        "ursa.registration_key": key,
        "ursa.gate_passed": str(report.gate_passed).lower(),
        "ursa.failed_gates": "; ".join(report.failed_gates),
        "ursa.comparison": comparison_text(report.comparison) if report.comparison else "",
        "ursa.metrics": json.dumps(report.metrics),
        "ursa.evaluation": report.manifest_uri,
        "ursa.model_directory": report.model.directory_uri,
    }
    with service(run.tracking_uri) as client:
        versions = _versions(client, name, "ursa.registration_key", key)
        if versions and releases.WHOLE_TAG not in versions[-1].tags:
            # a kill left it: its files may have gone since
            try:
                verify_files(run.tracking_uri, str(versions[-1].source), report.model)
            except RegistrationError:
                client.delete_model_version(name, str(versions[-1].version))
                versions = []
        if not versions:
            _remove_leftovers(client, run.experiment_id, name, key)
            model = _log_model(run, report, config, all_tags)
            client.update_run(run.run_id, status="RUNNING")  # MLflow has ended it
            verify_files(run.tracking_uri, model.model_uri, report.model)
            with contextlib.suppress(Exception):
                client.create_registered_model(name)
            versions = [
                client.create_model_version(
                    name, model.model_uri, run.run_id, all_tags, model_id=model.model_id
                )
            ]
        known = versions[-1].tags
        is_new = releases.WHOLE_TAG not in known
        registry = releases.Registry(client, name, root_uri, decided_by)
        if is_new:
            releases.finish_version(registry, str(versions[-1].version), report)
        elif known.get("ursa.gate_passed") == "false":
            # other gates may hold now; a version that passed before keeps what a person made of it
            releases.decide_by_gate(registry, str(versions[-1].version), report)
        # a version found again has the newest lineage; what the next run finds it by comes last
        for tag, value in sorted(all_tags.items(), key=lambda item: item[0] == FINGERPRINT_TAG):
            client.set_model_version_tag(name, versions[-1].version, tag, value)
        return _version_record(client.get_model_version(name, versions[-1].version), is_new=is_new)


def verify_files(tracking_uri: str, model_uri: str, model: ExportedModel) -> None:
    """Download a logged model and compare the sha256 of every exported file.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: The logged model.
        model: What was exported.

    Raises:
        RegistrationError: If a file is missing or differs.
        ServiceError: If the server does not answer.
    """
    with storage.scratch_directory("verify") as folder:
        root = _download(tracking_uri, model_uri, folder)
        for relative, expected in model.sha256.items():
            matches = [path for path in root.glob(f"artifacts/*/{relative}") if path.is_file()]
            if len(matches) != 1 or storage.sha256_file(matches[0]) != expected:
                raise RegistrationError(
                    f"{model_uri}: {relative} is missing or differs from the exported file; run "
                    "again to register the model anew"
                )


def missing_files(client: "MlflowClient", model_id: str, model: ExportedModel) -> str | None:
    """Return which exported files a logged model lacks, by name; None if it has all.

    Args:
        client: MLflow's client.
        model_id: Id of the logged model.
        model: What was exported.
    """

    def names(folder: str) -> Iterator[str]:
        for item in client.list_logged_model_artifacts(model_id, folder):
            if item.is_dir:
                yield from names(item.path)
            else:
                yield item.path

    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.get_logged_model(model_id)
        found = {path.split("/", 2)[-1] for path in names("artifacts")}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return "its logged model is gone"
    gone = sorted(set(model.sha256) - found)
    if gone and not found:
        return ALL_GONE
    return f"{len(gone)} of its files are gone, such as {gone[0]}" if gone else None


def _versions(client: "MlflowClient", name: str, tag: str, value: str) -> list[Any]:
    """Return versions with a tag, oldest first; those that lack files are registered anew."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{tag}` = '{value}'")
    kept = [item for item in found if releases.DAMAGED_TAG not in item.tags]
    return sorted(kept, key=lambda item: int(item.version))


def _aliases(client: "MlflowClient", name: str, version: str) -> list[str]:
    return list(client.get_model_version(name, version).aliases)


def _version_record(item: Any, *, is_new: bool) -> ModelVersion:
    aliases = list(item.aliases)
    best = next((alias for alias in ("champion", "challenger") if alias in aliases), None)
    return ModelVersion(
        name=item.name,
        version=str(item.version),
        run_id=item.run_id,
        model_uri=f"models:/{item.name}/{item.version}",
        alias=best,
        is_new=is_new,
    )


def _remove_leftovers(client: "MlflowClient", experiment_id: str, name: str, key: str) -> None:
    """Delete models that an interrupted registration has left without a version."""
    used = {logged_model_id(version) for version in client.search_model_versions()}
    for left in logged_models(client, experiment_id, f"tags.`ursa.registration_key` = '{key}'"):
        # the same weights may be on their way, or registered, under another name
        if left.name == name and left.model_id not in used:
            client.delete_logged_model(left.model_id)


def logged_models(
    client: "MlflowClient", experiment_id: str, query: str | None = None
) -> Iterator[Any]:
    """Yield all logged models of an experiment: a search returns a hundred at most.

    Args:
        client: MLflow's client.
        experiment_id: The experiment.
        query: Which ones, in MLflow's words; None yields all.
    """
    page: str | None = None
    while True:
        found = client.search_logged_models([experiment_id], query, page_token=page)
        yield from found
        page = found.token
        if not page:
            return


def logged_model_id(version: Any) -> str:
    """Return the id of the logged model that a version is of.

    Args:
        version: As a search returns it, which leaves out its own field for that.
    """
    return str(version.source or "").rpartition("/")[2]


def _log_model(
    run: TrackedRun, report: EvalReport, config: RunConfig, tags: Mapping[str, str]
) -> Any:
    import mlflow  # noqa: PLC0415

    from tasks.pyfunc_model import INPUT_EXAMPLE, pip_requirements, signature  # noqa: PLC0415

    mlflow.set_tracking_uri(run.tracking_uri)
    mlflow.set_registry_uri(run.tracking_uri)
    with (
        storage.local_directory(report.model.directory_uri) as folder,
        mlflow.start_run(run_id=run.run_id, log_system_metrics=False),
    ):
        info = mlflow.pyfunc.log_model(
            name=config.release.model_name,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(folder)},
            code_paths=[str(Path(storage.__file__).parent)],
            signature=signature(),
            input_example=INPUT_EXAMPLE,
            pip_requirements=pip_requirements(),
            metadata={"config": config.model_dump(mode="json"), "lineage": dict(tags)},
            tags=dict(tags),
        )
        mlflow.log_metrics(report.metrics, step=0, model_id=info.model_id)
    return info


def _download(tracking_uri: str, model_uri: str, folder: Path) -> Path:
    import mlflow  # noqa: PLC0415

    with service(tracking_uri):
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=model_uri, dst_path=str(folder), tracking_uri=tracking_uri
            )
        )
