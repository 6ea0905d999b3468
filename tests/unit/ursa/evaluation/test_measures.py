import numpy as np
import pytest

from ursa.artifacts import Measurements
from ursa.evaluation.measures import (
    define,
    differences,
    group_cases,
    join,
    left_out,
    mean_measure,
    measurement_metrics,
    plain_measure,
    statistic_measure,
)

CASES = [f"case {number}" for number in range(12)]
GROUP = group_cases("t2v", CASES, ())


def test_the_largest_units_of_which_there_are_enough():
    prompts = [f"prompt {number // 3}" for number in range(12)]
    assert GROUP.unit == "sample"
    assert group_cases("t2v", CASES, (("prompt", prompts),)).unit == "sample"
    pairs = [f"prompt {number % 8}" for number in range(12)]
    group = group_cases("t2v", CASES, (("prompt", pairs),))
    assert (group.unit, group.units) == ("prompt", tuple(pairs))
    assert group_cases("t2v", CASES[:7], ()).unit is None


def test_a_mean_has_its_interval_unit_and_direction():
    measure = mean_measure("i2v_later_psnr", np.arange(12.0), GROUP)
    assert (measure.value, measure.unit, measure.better) == (5.5, "dB", "higher")
    assert 2 < measure.low < 5.5 < measure.high < 9
    few = mean_measure("i2v_later_psnr", [1.0, 2.0], group_cases("a", CASES[:2], ()))
    assert (few.value, few.low, few.high) == (1.5, None, None)


def test_a_statistic_is_resampled_by_units():
    values = np.arange(12.0)
    measure = statistic_measure(
        "t2v_energy_distance", lambda weights: float(weights @ values / weights.sum()), GROUP
    )
    mean = mean_measure("t2v_energy_distance", values, GROUP)
    assert measure.value == mean.value
    assert measure.low == pytest.approx(mean.low, abs=0.4)
    assert measure.high == pytest.approx(mean.high, abs=0.4)


def test_names_in_mlflow():
    parts = (
        Measurements(measures=(plain_measure("train_code_usage", 0.5),)),
        Measurements(measures=(mean_measure("t2v_motion", np.ones(12), GROUP),), cases=(GROUP,)),
    )
    assert measurement_metrics(join(*parts)) == {
        "eval/train_code_usage": 0.5,
        "eval/t2v_motion": 1.0,
        "eval/t2v_motion_low": 1.0,
        "eval/t2v_motion_high": 1.0,
    }


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("tokenizer_psnr_train", "dB"),
        ("steps4_i2v_later_ssim", "in [-1, 1]"),
        ("asked2.5_motion", "px/s at 256 px width"),
        ("motion_adherence", "rank correlation in [-1, 1]"),
        ("real_nearest_train_distance", "levels"),
    ],
)
def test_units_by_the_end_of_the_name(metric, unit):
    assert define(metric).unit == unit


def test_an_unknown_metric_is_refused():
    with pytest.raises(KeyError, match="fvd"):
        define("t2v_fvd")


def test_two_models_are_compared_case_by_case():
    def measured(shift, group=GROUP):
        spread = 100.0 * np.arange(12)  # far more than the difference
        noise = np.random.default_rng(0).normal(size=12) * 0.1
        measures = (
            mean_measure("i2v_later_psnr", spread + shift * (1 + noise), group),
            mean_measure("i2v_motion", spread + shift * (1 + noise), group),
            mean_measure("i2v_luminance_flicker", spread + shift * (1 + noise), group),
            mean_measure("i2v_sharpness", spread, group),
        )
        return Measurements(measures=measures, cases=(group,))

    found = {item.metric: item for item in differences(measured(2.0), measured(1.0))}
    assert found["i2v_later_psnr"].value == pytest.approx(1.0, abs=0.1)
    verdicts = {name: item.verdict for name, item in found.items()}
    assert verdicts == {
        "i2v_later_psnr": "better",
        "i2v_motion": "higher",
        "i2v_luminance_flicker": "worse",
        "i2v_sharpness": "not told apart",
    }
    others = group_cases("t2v", [f"other {number}" for number in range(12)], ())
    assert differences(measured(1.0), measured(1.0, others)) == []


def test_metrics_that_are_not_compared_are_named():
    def measured(*more, group=GROUP):
        measures = (mean_measure("i2v_later_psnr", np.ones(len(group.cases)), group), *more)
        return Measurements(measures=measures, cases=(group,))

    usage, loss = plain_measure("train_code_usage", 0.5), plain_measure("steps4_i2v_loss", 1.0)
    assert left_out(measured(), measured()) == {}
    assert left_out(measured(usage), measured(loss, usage)) == {
        "no means over cases": ["train_code_usage"],
        "measured of one of the two": ["steps4_i2v_loss"],
    }
    fewer = group_cases("t2v", CASES[:10], ())
    assert left_out(measured(), measured(group=fewer)) == {
        "measured on other clips": ["i2v_later_psnr"]
    }
    assert differences(measured(), measured(group=fewer)) == []
