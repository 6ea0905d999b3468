"""Three runs of the same thing at once, interleaved at every operation."""

import pytest

from tests.faults import protocols
from tests.faults.writers import disagreements, run_together

pytestmark = pytest.mark.usefixtures("fast_files")
SCENARIOS = {
    "ingestion": protocols.ingestion_scenario,
    "tokenization": protocols.tokenization_scenario,
    "training": protocols.training_scenario,
    "release": protocols.release_scenario,
}
NUM_SEEDS = {"tokenization": 300}


@pytest.mark.parametrize("name", SCENARIOS)
def test_writers_agree(name, tmp_path, monkeypatch, tiny_data):
    scenario = SCENARIOS[name](tmp_path, monkeypatch, tiny_data)
    orders = set()
    for seed in range(NUM_SEEDS.get(name, 60)):
        # two of three times the same content gives each writer other bytes
        scenario.work.differs = seed % 3 > 0
        scenario.work.clear()
        met = run_together(scenario, seed, one_dies=seed % 2 == 1)
        orders.add(tuple(met.store.objects))
        assert disagreements(scenario, met) == [], f"seed {seed}"
        assert len(met.results) >= 2
    assert len(orders) > 10, "the seeds give hardly any other order"
