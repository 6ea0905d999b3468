import os
import signal
import subprocess
import sys
import threading

import pytest

from ursa.training.checkpoint import latest_checkpoint
from ursa.training.stage import _stage_uri, find_stage, stage_fingerprint, train_stage
from ursa.training.termination import TERMINATED, Termination


class Told(BaseException):
    """What an orchestrator raises."""


@pytest.fixture
def raising_handler():
    def handle(*_: object) -> None:
        raise Told

    before = signal.signal(signal.SIGTERM, handle)
    yield handle
    signal.signal(signal.SIGTERM, before)


def test_handler_of_before_has_the_last_word(raising_handler):
    with Termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.requested
        with pytest.raises(Told):
            termination.end()
    assert signal.getsignal(signal.SIGTERM) is raising_handler


def test_signal_of_another_process_is_not_told_to_that_handler(raising_handler):
    with Termination() as termination, pytest.raises(SystemExit) as stop:
        termination.end()
    assert stop.value.code == TERMINATED


def test_signal_is_handed_on():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with Termination([child.pid]) as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
        with pytest.raises(SystemExit):
            termination.end()


def test_other_threads_leave_the_handler_alone(raising_handler):
    found = []

    def enter() -> None:
        with Termination():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [raising_handler]


def test_in_the_last_step_the_checkpoint_is_saved_and_the_stage_ends(make_request):
    """It comes after the step has asked for the last time: in validation, samples or metrics."""
    request = make_request(max_steps=3, checkpoint_every=50)

    def late(step, _metrics) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        train_stage(request, on_metrics=late)
    assert stop.value.code == TERMINATED
    assert find_stage(request) is None
    found = latest_checkpoint(_stage_uri(request), fingerprint=stage_fingerprint(request))
    assert found is not None
    assert found[1].step == 3
    assert train_stage(request).step == 3
