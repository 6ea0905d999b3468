"""Faults while foreign files become clips."""

import contextlib

import pytest

from tests.faults import memory_store, protocols
from tests.faults.sweep import check_any_one_or_two_faults, check_any_two_faults_of_all_kinds
from ursa import ingestion
from ursa.artifacts import SourceVideo
from ursa.errors import UrsaError

pytestmark = pytest.mark.usefixtures("fast_files")


def test_any_one_or_two_faults_are_harmless(tmp_path, monkeypatch, tiny_data):
    scenario = protocols.ingestion_scenario(tmp_path, monkeypatch, tiny_data)
    check_any_one_or_two_faults(scenario, share=0.25, second=memory_store.HARD_FAULTS, at_least=400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_two_faults_of_all_kinds_are_harmless(tmp_path, monkeypatch, tiny_data):
    scenario = protocols.ingestion_scenario(tmp_path, monkeypatch, tiny_data)
    check_any_two_faults_of_all_kinds(scenario)


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
