"""All single faults and all pairs of faults of a protocol.

Each protocol is swept in a file of its own, so that all processors have their share of the work.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.faults.memory_store import FAULTS, HARD_FAULTS, UNWINDING_FAULTS
from tests.faults.protocols import Outcome, Scenario, clean_run, run_to_end


class Swept(NamedTuple):
    """How many cases there were, and what went wrong in which."""

    num_cases: int
    violations: dict[str, list[str]]


def sweep(
    scenario: Scenario,
    *,
    first: Mapping[str, tuple[str, ...]] = FAULTS,
    second: Mapping[str, tuple[str, ...]] = HARD_FAULTS,
    share: float = 1.0,
    stop_at_first: bool = False,
) -> Swept:
    """Run every single fault, and after every hard one every second fault that can follow.

    Args:
        scenario: The protocol.
        first: Kinds of single faults by kind of operation.
        second: Kinds of faults in pairs; the second may strike in the run that resumes.
        share: Of the pairs that are run, spread evenly over all.
        stop_at_first: Stop at the first violation.
    """
    num_cases, violations = 0, {}
    for faults, outcome in _cases(scenario, first, second, share):
        num_cases += 1
        if outcome.problems:
            named = ", ".join(f"{kind} at {place}" for place, kind in faults.items())
            violations[named] = outcome.problems
            if stop_at_first:
                break
    return Swept(num_cases, violations)


def _cases(
    scenario: Scenario,
    first: Mapping[str, tuple[str, ...]],
    second: Mapping[str, tuple[str, ...]],
    share: float,
) -> Iterator[tuple[dict[int, str], Outcome]]:
    clean = clean_run(scenario)
    numbers = itertools.count()
    for place, operation in enumerate(clean.store.trace):
        for kind in first[operation]:
            single = {place: kind}
            outcome = run_to_end(scenario, single, clean)
            yield single, outcome
            if kind not in second[operation]:
                continue
            for later in range(place + 1, len(outcome.trace)):
                for other in second[outcome.trace[later]]:
                    number = next(numbers)
                    if int((number + 1) * share) > int(number * share):
                        pair = single | {later: other}
                        yield pair, run_to_end(scenario, pair, clean)


def check_any_one_or_two_faults(
    scenario: Scenario,
    *,
    share: float,
    second: Mapping[str, tuple[str, ...]] = UNWINDING_FAULTS,
    at_least: int = 1000,
) -> None:
    """Assert that no single fault and no pair does harm, among so many cases and more.

    Args:
        scenario: The protocol.
        share: Of the pairs that are run each time; the slow test runs them all.
        second: Kinds of second faults: the hard ones, and those that make a run clean up.
        at_least: How many cases there are at least.
    """
    clean = clean_run(scenario).store
    assert scenario.problems(clean.copy()) == []
    swept = sweep(scenario, second=second, share=share)
    assert swept.violations == {}
    assert swept.num_cases >= at_least, swept.num_cases


def check_any_two_faults_of_all_kinds(scenario: Scenario) -> None:
    """Assert that no pair of faults does harm, of whatever kinds."""
    swept = sweep(scenario, second=FAULTS)
    assert swept.violations == {}
    assert swept.num_cases >= 5000
