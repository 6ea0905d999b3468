import logging

import pytest
from prefect.states import Completed, exception_to_failed_state

from tasks.options import retry_if_transient, root_flow_run_id, show_library_logs
from ursa.errors import DataError, ServiceError, StorageConfigurationError, StorageError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("x"), True),
        (ServiceError("x"), True),
        (StorageConfigurationError("x"), False),
        (DataError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_only_transient_errors_are_repeated(error: Exception, expected: bool) -> None:
    import asyncio

    state = asyncio.run(exception_to_failed_state(error))
    assert retry_if_transient(None, None, state) is expected  # type: ignore[arg-type]


def test_completed_state_is_not_repeated() -> None:
    assert retry_if_transient(None, None, Completed(data=1)) is False  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "kept"), [(DataError("no clips at x"), False), (KeyError("bug"), True)]
)
def test_known_errors_lose_their_traceback(error: Exception, kept: bool) -> None:
    show_library_logs()
    logger = logging.getLogger("prefect.task_runs")
    information = (type(error), error, None)
    record = logger.makeRecord(logger.name, 40, "f", 1, "failed", (), information)
    assert all(item.filter(record) for item in logger.filters)
    assert bool(record.exc_info) is kept
    assert logging.getLogger("ursa").level == logging.INFO


def test_the_flow_run_around_all_others_is_known_without_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert root_flow_run_id() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "6f0c2a1e-0000-0000-0000-000000000001")
    assert root_flow_run_id() == "6f0c2a1e-0000-0000-0000-000000000001"
