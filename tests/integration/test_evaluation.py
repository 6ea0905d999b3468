"""The evaluation of the real preset `tiny` on real videos: more training is told from less."""

import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.bench import evaluation as bench
from ursa.evaluation.measures import differences

VIDEOS = Path(__file__).parents[1] / "data" / "videos"
TOKENS = ("loss", "accuracy", "async_loss", "async_accuracy", "i2v_loss", "i2v_accuracy")
CLIPS = (
    "i2v_temporal_flicker",
    "i2v_later_ssim",
    "i2v_later_token_accuracy",
    "steps4_i2v_later_psnr",
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_untrained_half_trained_and_trained_models_are_told_apart(tmp_path):
    config = bench.bench_config("tiny")
    with ProcessPoolExecutor(2) as pool:
        data = bench.prepare(str(VIDEOS), str(tmp_path), config, pool)
    models = bench.models_of(*bench.train(data, str(tmp_path), config))
    found = bench.measure(models, data, config)
    measures = {name: {item.metric: item for item in part.measures} for name, part in found.items()}
    for less, more in itertools.pairwise(found):
        compared = {item.metric: item for item in differences(found[more], found[less])}
        assert {compared[metric].verdict for metric in TOKENS} == {"better"}
        apart = {
            metric
            for metric in TOKENS
            if bench.are_apart(measures[less][metric], measures[more][metric])
        }
        # windows differ more from each other than the last two models do: pairing is what tells
        if less == "untrained":
            assert apart == set(TOKENS)
        else:
            assert apart >= {"async_loss", "i2v_loss"}  # as docs/results.md says
    untrained, trained = measures["untrained"], measures["trained"]
    compared = {item.metric: item for item in differences(found["trained"], found["untrained"])}
    for metric in CLIPS:
        assert bench.are_apart(untrained[metric], trained[metric]), metric
        assert compared[metric].verdict == "better"
    one, other = (part["t2v_nearest_train_distance"] for part in (untrained, trained))
    assert bench.are_apart(one, other)
    assert trained["i2v_first_token_accuracy"].value == 1.0
