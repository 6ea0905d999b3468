"""`ursa plan` against what happens: samples of a data root, memory and time of training."""

import time

import pytest

from tests import data_roots
from tests.bench import plan as bench
from ursa.inspection.samples import count_samples
from ursa.training.plan import token_bytes


def test_samples_of_a_data_root_are_counted(tmp_path):
    root = data_roots.write_data_root(tmp_path)
    found = count_samples(root.uri, root.config)
    assert found.num_clips == root.selection.num_train + root.selection.num_validation
    for split, counts in (("train", found.num_train), ("validation", found.num_validation)):
        for modality in ("image", "video"):
            assert counts[modality] == root.datasets.get(modality, split).num_samples
    parts = [
        root.datasets.get(modality, split)
        for modality in ("image", "video")
        for split in ("train", "validation")
    ]
    assert found.num_tokens == sum(part.num_tokens for part in parts)
    ids = 2 * found.num_tokens
    assert ids < token_bytes(root.config, found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", bench.CASES)
def test_memory_and_time_of_training(name):
    measured = bench.measure(name, 1)
    plan = bench.predict(name, 1, time.process_time)
    assert plan.memory.total_bytes == pytest.approx(measured.peak_bytes, rel=0.25)
    # of the processor: other processes do not count, but they share its caches
    assert 0.6 < plan.step_s / measured.processor_s < 1.6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "level"),
    [("tiny", "mlp"), ("deep", "attention"), ("deep", "layer"), ("adapters", "layer")],
)
def test_memory_with_parts_computed_again(name, level):
    measured = bench.measure(name, 1, level)
    plan = bench.predict(name, 1, level=level)
    assert plan.memory.total_bytes == pytest.approx(measured.peak_bytes, rel=0.25)
