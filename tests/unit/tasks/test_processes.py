import os
import subprocess
import sys

import pytest

from tasks.processes import flow_run_ids, process_lives, process_mark


def test_this_process_lives_and_others_are_not_taken_for_it() -> None:
    host, pid, start = process_mark().rsplit(":", 2)
    assert int(pid) == os.getpid()
    assert process_lives(process_mark()) is True
    assert process_lives(f"{host}:{pid}:{int(start) - 60}") is False  # the pid was used before
    assert process_lives(f"elsewhere-{host}:{pid}:{start}") is None
    assert process_lives(None) is None


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_process_is_gone(is_reaped: bool) -> None:
    code = "from tasks.processes import process_mark; print(process_mark(), flush=True); input()"
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "a-flow-run"}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    mark = child.stdout.readline().strip()
    assert process_lives(mark) is True
    assert "a-flow-run" in flow_run_ids()
    child.kill()
    if is_reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert process_lives(mark) is False
    child.communicate()
