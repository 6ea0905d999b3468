"""Three runs of the same thing at once, interleaved at every operation."""

import pytest

from tests.faults import protocols
from tests.faults.protocols import SCENARIOS
from tests.faults.writers import disagreements, run_together

pytestmark = pytest.mark.usefixtures("fast_files")


def meet(scenario, num_seeds):
    """Let the writers run in so many orders; yield each with what they left."""
    orders = set()
    for seed in range(num_seeds):
        # two of three times the same content gives each writer other bytes
        scenario.work.differs = seed % 3 > 0
        scenario.work.clear()
        met = run_together(scenario, seed, one_dies=seed % 2 == 1)
        orders.add(tuple(met.store.objects.items()))
        assert len(met.results) >= 2, met.errors
        yield seed, met
    assert len(orders) > 6, "the seeds give hardly any other order"


def check_agreement(scenario, num_seeds):
    for seed, met in meet(scenario, num_seeds):
        assert disagreements(scenario, met) == [], f"seed {seed}"


def check_chains(scenario, num_seeds):
    for seed, met in meet(scenario, num_seeds):
        assert met.errors == []
        assert scenario.problems(met.store.copy()) == [], f"seed {seed}"
        with protocols.in_use(met.store.copy()):
            standing = protocols.list_versions(protocols.ROOT)
        for result in met.results:
            assert set(map(repr, result)) <= set(map(repr, standing)), f"seed {seed}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_writers_agree(name, tmp_path, monkeypatch, tiny_data):
    check_agreement(SCENARIOS[name](tmp_path, monkeypatch, tiny_data), 40)


def test_writers_of_other_versions_make_one_chain(tmp_path, monkeypatch, tiny_data):
    check_chains(protocols.versions_scenario(tmp_path, monkeypatch, tiny_data, is_own=True), 40)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_writers_agree_in_300_orders(name, tmp_path, monkeypatch, tiny_data):
    check_agreement(SCENARIOS[name](tmp_path, monkeypatch, tiny_data), 300)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_writers_of_other_versions_make_one_chain_in_300_orders(tmp_path, monkeypatch, tiny_data):
    check_chains(protocols.versions_scenario(tmp_path, monkeypatch, tiny_data, is_own=True), 300)
