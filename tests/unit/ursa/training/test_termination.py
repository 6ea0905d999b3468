import os
import signal
import subprocess
import sys
import threading

import pytest

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
