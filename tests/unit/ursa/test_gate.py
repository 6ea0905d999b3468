import math

import numpy as np
import pytest

from tests import factories
from ursa.artifacts import HeldOutScores, LossGrid
from ursa.gate import (
    compare,
    comparison_metrics,
    comparison_text,
    failed_gates,
    metric_intervals,
    not_compared,
)

TIMES = (0.0, 0.5, 0.9)
BUDGETS = {"loss": 0.05, "accuracy": 0.02, "i2v_loss": None}


def config_of(**release):
    return factories.tiny_config({"release": {"budgets": BUDGETS, **release}})


CONFIG = config_of()


def grid_of(loss, accuracy, setting="synchronous"):
    loss, accuracy = np.asarray(loss, float), np.asarray(accuracy, float)
    rows = ((1.0,),) * len(TIMES)
    return LossGrid(
        setting=setting,
        timesteps=TIMES,
        loss_by_time=(float(loss.mean()),) * len(TIMES),
        accuracy_by_time=(float(accuracy.mean()),) * len(TIMES),
        first_frame=0,
        loss=rows,
        accuracy=rows,
        sample_loss=tuple(loss),
        sample_accuracy=tuple(accuracy),
    )


def scores_of(loss, *, accuracy=None, per_source=1, names="s"):
    count = len(loss)
    accuracy = np.full(count, 0.5) if accuracy is None else accuracy
    return HeldOutScores(
        manifest_uri="u",
        model_key="k",
        sample_ids=tuple(f"{names}{i}" for i in range(count)),
        clip_ids=tuple(f"c{i // per_source}" for i in range(count)),
        source_ids=tuple(f"v{i // per_source}" for i in range(count)),
        span_ids=tuple(f"c{i // per_source}+{i % per_source}" for i in range(count)),
        grids=(grid_of(loss, accuracy),),
    )


def compared(challenger, champion, *, known=frozenset(), config=CONFIG):
    return compare(
        challenger,
        champion,
        champion_version="3",
        known_sources=known,
        config=config.release,
    )


def measured(loss=1.0, untrained=4.0, unigram=2.0):
    metrics = {f"eval/loss_t{t:g}": loss for t in TIMES}
    metrics |= {f"eval/untrained_loss_t{t:g}": untrained for t in TIMES}
    return metrics | {"eval/unigram_loss": unigram, "eval/loss": loss}


RANDOM = np.random.default_rng(1)
EASE = RANDOM.normal(4.0, 1.0, 40)
NOISE = RANDOM.normal(0.0, 0.02, 40)
CHAMPION = scores_of(EASE, per_source=2)


def test_nothing_held_out_is_no_pass():
    trained_only = {"eval/train_loss": 0.1, "eval/train_loss_t0": 0.1}
    (reason,) = failed_gates(trained_only, None, CONFIG)
    assert reason.startswith("no held-out clips")


def test_gate_is_open_for_a_good_first_model():
    assert failed_gates(measured(), None, CONFIG) == ()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (measured(loss=4.5), "not below the untrained model's 4.000"),
        (measured(loss=math.nan), "loss at t=0 is nan"),
        (measured(loss=3.0), "loss at t=0.5 is 3.000, not below the unigram's 2.000"),
    ],
)
def test_gate_names_what_failed(metrics, message):
    assert any(message in reason for reason in failed_gates(metrics, None, CONFIG))


def test_every_metric_that_is_judged_must_be_finite():
    metrics = measured() | {"eval/i2v_loss": float("nan")}
    release = CONFIG.release.model_copy(update={"budgets": {"i2v_loss": 0.1, "loss": None}})
    judged = CONFIG.model_copy(update={"release": release})
    assert failed_gates(metrics, None, judged) == ("i2v_loss is not finite",)
    assert failed_gates(measured(), None, judged) == ()


def test_unigram_counts_from_its_time_on():
    reasons = failed_gates(measured(loss=3.0), None, CONFIG)
    assert not any("t=0 " in reason for reason in reasons)


def test_equal_models_differ_by_nothing_and_pass_without_any_budget():
    config = config_of(budgets={"loss": 0.0, "accuracy": 0.0})
    comparison = compared(CHAMPION, CHAMPION, config=config)
    assert [(c.metric, c.difference, c.low, c.high) for c in comparison.changes] == [
        ("loss", 0.0, 0.0, 0.0),
        ("accuracy", 0.0, 0.0, 0.0),
    ]
    assert failed_gates(measured(), comparison, config) == ()


def test_the_whole_interval_must_lie_within_the_budget():
    """Of a difference below the budget whose interval reaches beyond it nothing is shown."""
    close = compared(scores_of(EASE + 0.03 + NOISE, per_source=2), CHAMPION)
    assert failed_gates(measured(), close, CONFIG) == ()
    spread = np.repeat(RANDOM.normal(0.0, 0.15, 20), 2)
    unsure = compared(scores_of(EASE + spread - spread.mean() + 0.03, per_source=2), CHAMPION)
    assert unsure.changes[0].difference == pytest.approx(0.03)
    (reason,) = failed_gates(measured(), unsure, CONFIG)
    assert reason.startswith("loss may be worse than that of champion version 3")
    assert "more held-out clips" in reason
    worse = compared(scores_of(EASE + 0.2 + NOISE, per_source=2), CHAMPION)
    (reason,) = failed_gates(measured(), worse, CONFIG)
    assert reason.startswith("loss is worse than that of champion version 3")
    assert "on 40 samples of 20 sources" in reason
    assert "may be worse by 0.05" in reason
    better = compared(scores_of(EASE - 0.2 + NOISE, per_source=2), CHAMPION)
    assert failed_gates(measured(), better, CONFIG) == ()


def test_less_accuracy_is_worse():
    fewer = scores_of(EASE, accuracy=np.full(40, 0.4), per_source=2)
    (reason,) = failed_gates(measured(), compared(fewer, CHAMPION), CONFIG)
    assert reason.startswith("accuracy is worse")
    more = scores_of(EASE, accuracy=np.full(40, 0.6), per_source=2)
    assert failed_gates(measured(), compared(more, CHAMPION), CONFIG) == ()


def test_a_metric_without_a_budget_is_reported_and_not_judged():
    config = config_of(budgets={"loss": None, "accuracy": None})
    worse = compared(scores_of(EASE + 0.5, per_source=2), CHAMPION, config=config)
    assert failed_gates(measured(), worse, config) == ()
    assert comparison_metrics((), worse)["eval/vs_champion_loss"] == pytest.approx(0.5)


def test_too_few_samples_are_no_proof():
    few = compared(scores_of(EASE[:7] - 1.0), scores_of(EASE[:7]))
    assert (few.unit, few.changes[0].low) == (None, None)
    (reason,) = failed_gates(measured(), few, CONFIG)
    assert "7 held-out samples are too few" in reason


def test_many_windows_of_little_footage_are_no_proof():
    """Of 16 windows, one frame apart, that share their frames, two do not."""
    windows = scores_of(EASE[:16] - 1.0, per_source=16)
    spans = {"span_ids": tuple(f"c0+{i // 8}" for i in range(16))}
    challenger = windows.model_copy(update=spans)
    champion = scores_of(EASE[:16], per_source=16).model_copy(update=spans)
    little = compared(challenger, champion)
    assert (little.unit, little.num_units) == (None, 0)
    (reason,) = failed_gates(measured(), little, CONFIG)
    assert "of 4 stretches of footage that share no frames" in reason
    enough = compared(windows, scores_of(EASE[:16], per_source=16))
    assert (enough.unit, enough.num_units) == ("span", 16)
    assert "on 16 samples of 16 spans: " in comparison_text(enough)
    four = {"span_ids": tuple(f"c0+{i // 4}" for i in range(16))}
    few = compared(windows.model_copy(update=four), champion.model_copy(update=four))
    assert "on 16 samples of 4 spans (so few that the 95 % interval holds" in comparison_text(few)


def test_what_the_champion_was_trained_on_is_left_out():
    # the champion knows the first ten sources by heart
    champion = scores_of(np.where(np.arange(40) < 20, 0.1, EASE), per_source=2)
    challenger = scores_of(EASE + NOISE, per_source=2)
    assert failed_gates(measured(), compared(challenger, champion), CONFIG)
    known = {f"v{i}" for i in range(10)} | {"elsewhere"}
    fair = compared(challenger, champion, known=known)
    assert (fair.num_samples, fair.num_units, fair.num_known_sources) == (20, 10, 10)
    assert fair.changes[0].champion == pytest.approx(EASE[20:].mean())
    assert failed_gates(measured(), fair, CONFIG) == ()
    assert "10 sources that it was trained on are left out" in comparison_text(fair)
    all_of_them = compared(challenger, champion, known={f"v{i}" for i in range(20)})
    assert "trained on all 20 sources" in (all_of_them.problem or "")
    # it may be any amount worse: what is held out cannot tell
    (reason,) = failed_gates(measured(), all_of_them, CONFIG)
    assert "cannot be compared: it was trained on all 20 sources" in reason
    assert "add videos, hold out more" in reason


def test_other_samples_are_not_compared():
    other = compared(scores_of(EASE, names="x"), scores_of(EASE))
    assert other.problem == "they were measured on other samples"
    assert other.refuses


def test_what_cannot_be_compared_passes_unless_it_must_not():
    problem = not_compared("3", "its visual tokenizer is another")
    assert failed_gates(measured(), problem, CONFIG) == ()
    strict = config_of(require_comparison=True)
    (reason,) = failed_gates(measured(), problem, strict)
    assert reason == "champion version 3 cannot be compared: its visual tokenizer is another"


def test_means_have_intervals_and_names():
    intervals = metric_intervals(CHAMPION)
    assert [item.metric for item in intervals] == ["loss", "accuracy"]
    loss = intervals[0]
    assert loss.value == pytest.approx(EASE.mean())
    assert loss.low < loss.value < loss.high
    metrics = comparison_metrics(intervals, compared(CHAMPION, CHAMPION))
    assert metrics["eval/loss_low"] == loss.low
    assert metrics["eval/champion_loss"] == pytest.approx(EASE.mean())
    assert metrics["eval/vs_champion_loss_high"] == 0.0
    assert metric_intervals(scores_of(EASE[:7])) == ()
