import numpy as np

from tests.bench.evaluation import MODELS, bench_config, table
from ursa.artifacts import Measurements
from ursa.config import STAGES
from ursa.evaluation.measures import group_cases, mean_measure

GROUP = group_cases("held_out", [f"window {number}" for number in range(12)], ())


def measured(shift):
    values = np.linspace(0, 1, 12)
    noise = np.random.default_rng(0).normal(size=12) * 0.01
    measures = (
        mean_measure("loss", values - shift * (1 + noise), GROUP),
        mean_measure("real_motion", values, GROUP),
    )
    return Measurements(measures=measures, cases=(GROUP,))


def test_the_table_says_what_overlaps_and_what_the_differences_say():
    found = dict(zip(MODELS, (measured(0.0), measured(5.0), measured(5.1)), strict=True))
    header, _, row = table(found)
    assert header.startswith("| metric | untrained | half trained | trained |")
    assert row.startswith("| `loss` |")
    # the third is better by little: its interval overlaps, that of the difference does not
    assert row.endswith("| apart | overlap | better, then better |")


def test_half_of_the_steps_are_a_checkpoint():
    config = bench_config("tiny")
    steps = [getattr(config.stages, stage).max_steps for stage in STAGES]
    kept = config.stages.video_pretrain.checkpoint_every
    assert steps[0] + kept == sum(steps) // 2
    assert kept < steps[1]
