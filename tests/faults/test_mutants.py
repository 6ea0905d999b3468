"""The fault tests must find protocols that are broken on purpose."""

import pytest

from tests.faults import memory_store, protocols
from tests.faults.mutants import MUTANTS, applied
from tests.faults.protocols import SCENARIOS
from tests.faults.sweep import sweep
from tests.faults.writers import disagreements, run_together

pytestmark = pytest.mark.usefixtures("fast_files")
FEW, MANY = range(3), range(3, 30)
"""Orders of writers; a few cost less than all single faults and find about as much."""


def first_noticed(scenario, seeds):
    for seed in seeds:
        scenario.work.differs = seed % 3 > 0
        if disagreements(scenario, run_together(scenario, seed, one_dies=seed % 2 == 1)):
            return seed
    return None


def found_by(scenario, reference):
    """What notices: a clean run, several writers, one fault or two faults; None if nothing does."""
    scenario.work.differs = False
    clean = protocols.clean_run(scenario).store
    if scenario.problems(clean.copy()):
        return "what is there after a clean run"
    if scenario.is_reproducible and protocols.differences(clean.objects, reference.objects):
        return "the bytes of a clean run"
    no_pairs = dict.fromkeys(memory_store.FAULTS, ())
    if (seed := first_noticed(scenario, FEW)) is not None:
        return f"writers in the order of seed {seed}"
    scenario.work.differs = False
    if sweep(scenario, second=no_pairs, stop_at_first=True).violations:
        return "one fault"
    if (seed := first_noticed(scenario, MANY)) is not None:
        return f"writers in the order of seed {seed}"
    scenario.work.differs = False
    return "two faults" if sweep(scenario, stop_at_first=True).violations else None


def notices(scenario, reference):
    try:
        return found_by(scenario, reference)
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError):
        raise  # the mutant is broken, and not the protocol
    except Exception as error:  # noqa: BLE001
        return f"a test fails: {error!r}"


def test_broken_protocols_are_found(tmp_path, monkeypatch, tiny_data):
    survivors = {}
    for index, mutant in enumerate(MUTANTS):
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            scenario = SCENARIOS[mutant.scenario](folder, patch, tiny_data)
            reference = protocols.clean_run(scenario).store
            with applied(mutant):
                by = notices(scenario, reference)
        if by is None:
            survivors[mutant.name] = mutant.scenario
    assert len(MUTANTS) >= 20
    assert len(survivors) <= 0.05 * len(MUTANTS), survivors
