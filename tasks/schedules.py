"""The schedule of the retraining deployment: switch it on or off, run it once, say how it is.

The client is Prefect's, with the address and the credentials of the environment. What `on` is given
is kept twice: in the deployment, as the event and a run by hand know no schedule, and in the
schedule, from where deploying again takes it (`infra/local/services.py`, `infra/bootstrap.py`).
"""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from ursa.config import load_config
from ursa.errors import ConfigError, ServiceError, UrsaError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

DEPLOYMENT = "ursa/scheduled-retraining"


@contextlib.contextmanager
def _deployment(
    prefect_url: str,
) -> Iterator[tuple[SyncPrefectClient, "DeploymentResponse"]]:
    """Yield a client and the deployment; name the server in every error."""
    try:
        with (
            temporary_settings({PREFECT_API_URL: f"{prefect_url}/api"}),
            get_client(sync_client=True) as client,
        ):
            yield client, client.read_deployment_by_name(DEPLOYMENT)
    except UrsaError:  # what is refused here is no fault of the server; some are ValueErrors
        raise
    except ObjectNotFound as error:
        raise ConfigError(
            f"Prefect at {prefect_url} has no deployment {DEPLOYMENT}; make it with `make deploy`"
        ) from error
    except PrefectHTTPStatusError as error:
        first = " ".join(error.response.text.split())[:300]
        raise ServiceError(
            f"Prefect at {prefect_url} answers {error.response.status_code}: {first}"
        ) from error
    except (httpx.HTTPError, ValueError) as error:  # ValueError: an answer that is no JSON
        raise ServiceError(f"Prefect at {prefect_url}: {error}") from error


def switch(
    prefect_url: str, *, active: bool | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Switch the schedule on or off, or only say how it is.

    Args:
        prefect_url: Address of the Prefect server, without "/api".
        active: Whether it is on afterwards; None changes nothing.
        parameters: What all runs of the deployment get in place of what they got before: those of
            the schedule, of the event, and those by hand that are told nothing else.

    Returns:
        `active`, `schedules` in words, `parameters` of their runs, `event_parameters` of the other
        runs (the same unless somebody has edited one of them in Prefect), `next` as an ISO 8601
        time or None, `url` of the deployment's page.

    Raises:
        ConfigError: If the server has no such deployment, or it has no schedule, or preset and
            overrides make no configuration.
        ServiceError: If the server does not answer or refuses.
    """
    with _deployment(prefect_url) as (client, deployment):
        if not deployment.schedules:
            raise ConfigError(
                f"{DEPLOYMENT} has no schedule at {prefect_url}; deploy prefect.yaml again: "
                "`make deploy`"
            )
        if active:
            _set_parameters(client, deployment, parameters)
        for item in deployment.schedules if active is not None else ():
            client.update_deployment_schedule(
                deployment.id,
                item.id,
                active=active,
                parameters={**item.parameters, **parameters},
            )
        if active and deployment.paused:  # a whole deployment can be paused on its page
            client.resume_deployment(deployment.id)
        now = client.read_deployment(deployment.id)
        return {
            "active": not now.paused and any(item.active for item in now.schedules),
            "schedules": [_words(item.schedule) for item in now.schedules],
            "parameters": {**now.parameters, **_own(now).parameters},
            "event_parameters": dict(now.parameters),
            "next": _next_run(client, deployment),
            "url": f"{prefect_url}/deployments/deployment/{deployment.id}",
        }


def _set_parameters(
    client: SyncPrefectClient, deployment: "DeploymentResponse", parameters: Mapping[str, Any]
) -> None:
    """Let the deployment itself have what its schedule has, and what is given now."""
    wanted = {**deployment.parameters, **_own(deployment).parameters, **parameters}
    _check_configuration(wanted)
    if wanted != deployment.parameters:
        client.update_deployment(deployment.id, DeploymentUpdate(parameters=wanted))


def _own(deployment: "DeploymentResponse") -> "DeploymentSchedule":
    """Return the schedule of prefect.yaml, which has a slug; those made in Prefect have none."""
    return next((item for item in deployment.schedules if item.slug), deployment.schedules[0])


def _check_configuration(parameters: Mapping[str, Any]) -> None:
    """Refuse what every run would refuse: a run of Monday's has nobody who looks."""
    load_config(str(parameters.get("preset", "tiny")), parameters.get("overrides"))


def run_once(prefect_url: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Let the deployment run now; a run that meets another one is cancelled by Prefect.

    Args:
        prefect_url: Address of the Prefect server, without "/api".
        parameters: What the run gets in place of the deployment's parameters.

    Returns:
        `name` and `url` of the run, `parameters`, and `has_worker`: whether somebody takes it.

    Raises:
        ConfigError: If the server has no such deployment, or preset and overrides make no
            configuration.
        ServiceError: If the server does not answer or refuses, such as a parameter.
    """
    with _deployment(prefect_url) as (client, deployment):
        _check_configuration({**deployment.parameters, **parameters})
        run = client.create_flow_run_from_deployment(deployment.id, parameters=dict(parameters))
        pool = client.read_work_pool(str(deployment.work_pool_name))
        return {
            "name": run.name,
            "url": f"{prefect_url}/runs/flow-run/{run.id}",
            "parameters": run.parameters,
            "has_worker": pool.status is not None and pool.status.value == "READY",
        }


def _words(schedule: Any) -> str:
    cron = getattr(schedule, "cron", None)
    text = f"cron {cron}" if cron else str(getattr(schedule, "interval", schedule))
    return f"{text} {schedule.timezone or 'UTC'}"


def _next_run(client: SyncPrefectClient, deployment: "DeploymentResponse") -> str | None:
    """Return when the schedule runs next; the server plans runs within a minute of a change."""
    query = {
        "deployment_id": {"any_": [str(deployment.id)]},
        "state": {"type": {"any_": ["SCHEDULED"]}},
        # the server's own: one by hand or of the event may wait too, and belongs to no schedule
        "tags": {"all_": ["auto-scheduled"]},
    }
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(query),
        sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
        limit=1,
    )
    due: datetime | None = runs[0].next_scheduled_start_time if runs else None
    return due.isoformat() if due else None
