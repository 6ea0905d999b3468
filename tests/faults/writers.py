"""Several writers in one process, interleaved operation by operation as a seed says."""

import random
import threading
from typing import Any, NamedTuple

from tests.faults.memory_store import Crashed, MemoryStore, in_use
from tests.faults.protocols import Scenario

NUM_WRITERS = 3


class Turns:
    """One writer runs at a time; before each operation the seed says who is next.

    In some orders it is mostly the next one, so that all do the same thing at the same time.
    """

    def __init__(self, num_writers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._may_run = [threading.Semaphore(0) for _ in range(num_writers)]
        self._alive = list(range(num_writers))
        self._steadiness = self._random.choice((0.0, 0.5, 0.9))
        self._latest = 0
        self._local = threading.local()

    def start(self) -> None:
        self._wake_one()

    def join(self, writer: int) -> None:
        """Wait in a new thread for the first turn."""
        self._local.writer = writer
        self._may_run[writer].acquire()

    def pass_on(self) -> None:
        """Let the next one run and wait for the next turn."""
        self._wake_one()
        self._may_run[self._local.writer].acquire()

    def leave(self) -> None:
        """The writer has ended."""
        self._alive.remove(self._local.writer)
        if self._alive:
            self._wake_one()

    def _wake_one(self) -> None:
        if self._random.random() < self._steadiness:
            later = [writer for writer in self._alive if writer > self._latest]
            self._latest = (later or self._alive)[0]
        else:
            self._latest = self._random.choice(self._alive)
        self._may_run[self._latest].release()


class Met(NamedTuple):
    """What several writers left, and what each of them returned or raised."""

    store: MemoryStore
    results: list[Any]
    errors: list[BaseException]


def run_together(scenario: Scenario, seed: int, *, one_dies: bool = False) -> Met:
    """Run the scenario in three threads at once.

    Args:
        scenario: The protocol; its writers differ if `work.differs`.
        seed: Decides who runs when, and who dies.
        one_dies: One of the writers ends in the middle.
    """
    store = scenario.start.copy()
    turns = Turns(NUM_WRITERS, seed)
    store.before_operation = turns.pass_on
    if one_dies:
        store.faults = {random.Random(seed).randrange(40): "crash_before"}
    results: list[Any] = []
    errors: list[BaseException] = []

    def write(writer: int) -> None:
        turns.join(writer)
        scenario.work.local.writer = writer
        try:
            result = scenario.run()
            if not store.is_dead():
                results.append(result)
        except Crashed:
            pass
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
        finally:
            turns.leave()

    with in_use(store):
        threads = [threading.Thread(target=write, args=(n,)) for n in range(NUM_WRITERS)]
        for thread in threads:
            thread.start()
        turns.start()
        for thread in threads:
            thread.join()
    return Met(store.copy(), results, errors)


def disagreements(scenario: Scenario, met: Met) -> list[str]:
    """What is wrong after several writers have run at once."""
    found = [f"a writer failed: {error!r}" for error in met.errors]
    with in_use(met.store.copy()):
        found += [
            f"a writer got {result}, a reader gets {standing}"
            for standing in [scenario.run()]
            for result in met.results
            if result != standing
        ]
    return found + scenario.problems(met.store)
