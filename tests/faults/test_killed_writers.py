"""Processes that are killed in the middle of an operation or of a write, or stopped for a while."""

import itertools
import random
import signal
import time

import pytest

from tests.faults import processes, protocols
from tests.faults.processes import Child, problems_after_kill, snapshot
from tests.faults.protocols import SCENARIOS
from ursa import storage

pytestmark = [pytest.mark.integration, pytest.mark.slow]
NUM_STORE_KILLS = 6
"""Of each protocol, on the S3 server."""
NUM_PAIRS = 10
PAUSE_S = 20.0
"""How long a process is stopped at least: the other one has long finished, its connections too."""


@pytest.fixture
def scenario_at(monkeypatch, tmp_path, tiny_data):
    """Return a function that makes a protocol at a root of its own."""

    def make(name, root_uri, number=0):
        monkeypatch.setattr(protocols, "ROOT", root_uri)
        folder = tmp_path / f"parts-{number}"
        folder.mkdir(parents=True)
        scenario = SCENARIOS[name](folder, monkeypatch, tiny_data)
        # what it begins with was made in a store in memory
        for key, data in scenario.start.objects.items():
            storage.write_bytes(f"s3://{key}", data)
        return scenario

    return make


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_operation_on_a_disk(name, scenario_at, tmp_path):
    num_killed = 0
    for number in itertools.count():
        root = str(tmp_path / f"{number}" / "root")
        scenario = scenario_at(name, root, number)

        def run(scenario=scenario, number=number, root=root):
            processes.die_at_operation(number, root)
            scenario.run()

        killed_by, _ = Child(run).wait()
        assert problems_after_kill(scenario, root) == [], f"operation {number}"
        if not killed_by:
            break
        assert killed_by == signal.SIGKILL
        num_killed += 1
    assert num_killed >= 30


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_in_the_middle_of_a_write(name, scenario_at, tmp_path):
    # shards and states are the larger files, records and clips the smaller ones
    sizes = [*range(0, 100, 20), *range(200, 1200, 200)]
    num_killed = 0
    for number, size in enumerate(sizes):
        root = str(tmp_path / f"{number}" / "root")
        scenario = scenario_at(name, root, number)

        def run(scenario=scenario, size=size):
            processes.die_at_byte(size)
            scenario.run()

        killed_by, _ = Child(run).wait()
        num_killed += killed_by == signal.SIGXFSZ
        assert problems_after_kill(scenario, root) == [], f"byte {size}"
    assert num_killed >= 5


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_while_it_talks_to_an_s3_server(name, scenario_at, s3_prefix):
    random_ = random.Random(name)
    started = time.monotonic()
    root = f"{s3_prefix}/warm/root"
    scenario = scenario_at(name, root, 0)
    Child(lambda: scenario.run() and None).wait()
    taken_s = time.monotonic() - started
    num_killed = 0
    for number in range(1, NUM_STORE_KILLS + 1):
        root = f"{s3_prefix}/{number}/root"
        scenario = scenario_at(name, root, number)
        child = Child(lambda scenario=scenario: scenario.run() and None)
        time.sleep(random_.uniform(0.2, 0.9) * taken_s)
        child.signal(signal.SIGKILL)
        num_killed += child.wait()[0] == signal.SIGKILL
        assert problems_after_kill(scenario, root) == [], number
    assert num_killed > 0


def agree(scenario, root, results):
    standing = scenario.run()
    assert all(result == standing for result in results)
    assert scenario.problems(snapshot(root)) == []


@pytest.mark.parametrize("where", ["disk", "store"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_agree(name, where, scenario_at, tmp_path, s3_prefix):
    for number in range(NUM_PAIRS):
        root = f"{tmp_path if where == 'disk' else s3_prefix}/{number}/root"
        scenario = scenario_at(name, root, number)
        scenario.work.differs = number % 2 == 0

        def run(writer, scenario=scenario):
            scenario.work.local.writer = writer
            return scenario.run()

        children = [Child(lambda writer=writer: run(writer)) for writer in range(2)]
        agree(scenario, root, [child.wait()[1] for child in children])


@pytest.mark.parametrize("where", ["disk", "store"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_writer_that_slept_while_another_finished(name, where, scenario_at, tmp_path, s3_prefix):
    random_ = random.Random(name)
    for number in range(3):
        # on the server one sleeps for long after the other has finished
        pause_s = PAUSE_S if where == "store" and number == 0 else 0.0
        root = f"{tmp_path if where == 'disk' else s3_prefix}/{number}/root"
        scenario = scenario_at(name, root, number)
        scenario.work.differs = True

        def run(writer, scenario=scenario):
            scenario.work.local.writer = writer
            return scenario.run()

        sleeper = Child(lambda: run(1))
        time.sleep(random_.uniform(0.0, 0.03 if where == "disk" else 0.3))
        sleeper.signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        _, first = Child(lambda: run(2)).wait()
        time.sleep(max(0.0, pause_s - (time.monotonic() - stopped_s)))
        sleeper.signal(signal.SIGCONT)
        _, late = sleeper.wait()
        assert late == first
        agree(scenario, root, [first, late])
