"""Every single fault and every pair of faults at every operation, in memory."""

import contextlib

import pytest

from tests.faults import memory_store, protocols
from tests.faults.protocols import SCENARIOS
from tests.faults.sweep import sweep
from ursa import ingestion
from ursa.artifacts import SourceVideo
from ursa.errors import UrsaError

pytestmark = pytest.mark.usefixtures("fast_files")
SECOND = {"ingestion": memory_store.HARD_FAULTS}
"""Second faults of pairs; of the others those as well that make a run clean up."""
SHARE = {
    "ingestion": 0.7,
    "tokenization": 0.72,
    "versions": 0.46,
    "training": 0.68,
    "release": 0.68,
}
"""Of the pairs that are run each time, the slow test runs them all: 1,000 cases are left."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_any_one_or_two_faults_are_harmless(name, tmp_path, monkeypatch, tiny_data):
    second = SECOND.get(name, memory_store.UNWINDING_FAULTS)
    scenario = SCENARIOS[name](tmp_path, monkeypatch, tiny_data)
    clean = protocols.clean_run(scenario).store
    assert scenario.problems(clean.copy()) == []
    swept = sweep(scenario, second=second, share=SHARE[name])
    assert swept.violations == {}
    assert swept.num_cases >= 1000, swept.num_cases


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENARIOS)
def test_any_two_faults_of_all_kinds_are_harmless(name, tmp_path, monkeypatch, tiny_data):
    scenario = SCENARIOS[name](tmp_path, monkeypatch, tiny_data)
    swept = sweep(scenario, second=memory_store.FAULTS)
    assert swept.violations == {}
    assert swept.num_cases >= 5000


def test_a_part_of_an_object_is_never_kept_as_the_whole(monkeypatch, tmp_path):
    """Every read of a source in the store is cut short without an error, one at a time."""
    work = protocols.Work()
    monkeypatch.setattr(ingestion, "normalise_video", protocols.stand_in_for_decoding(work))
    uri = "s3://memory/videos/a.mp4"
    content = b"\0\0\0\x20ftypisom" + bytes(60)
    start = memory_store.MemoryStore({"memory/videos/a.mp4": content})
    source = SourceVideo(uri=uri, num_bytes=len(content), etag="e")

    def ingest(faults):
        store = memory_store.MemoryStore(start.objects, faults)
        with memory_store.in_use(store):
            for _ in range(3):
                with contextlib.suppress(UrsaError):
                    unit = ingestion.ingest_video(source, memory_store.ROOT, protocols.INGESTION)
                    assert unit.failure is None
                    return store
        raise AssertionError("no end")

    clean = ingest({})
    for place in range(len(clean.trace)):
        assert ingest({place: "truncated"}).objects == clean.objects, place
