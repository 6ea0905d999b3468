import math

import numpy as np
import pytest

from tests import factories
from ursa.data.dataset import TokenSamples, code_counts
from ursa.evaluation.held_out import stage_metrics, unigram_metrics


def test_what_the_last_stage_changed(exported_model):
    known = {"val/i2v_accuracy": 0.5, "val/before_i2v_accuracy": 0.25, "val/loss": 1.0}
    known |= {"val/i2v_accuracy_change": 0.25, "val/i2v_accuracy_change_se": 0.1}
    checkpoint = exported_model.checkpoint.model_copy(update={"metrics": known})
    assert stage_metrics(checkpoint) == {
        "eval/before_i2v_accuracy": 0.25,
        "eval/after_i2v_accuracy": 0.5,
        "eval/i2v_accuracy_change": 0.25,
        "eval/i2v_accuracy_change_se": 0.1,
    }


def test_unigram_of_known_counts(tmp_path):
    train = factories.write_dataset(str(tmp_path / "a"), "image", "train", 8)
    samples = TokenSamples(train)
    metrics = unigram_metrics(code_counts(train), samples)
    ids = samples.batch(range(8)).visual_ids.flatten().tolist()
    counts = [ids.count(code) + 1 for code in range(60)]
    expected = -np.mean([math.log(counts[code] / sum(counts)) for code in ids])
    assert metrics["eval/unigram_loss"] == pytest.approx(expected)
    assert metrics["eval/unigram_accuracy"] == pytest.approx((max(counts) - 1) / len(ids))
