"""Stages whose workers each hold a part of the weights, in real processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import factories
from tests.warm import Fault, Outcome, Trace, Warm, trace, warm_process
from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE, StageRequest
from ursa.training import stage as stage_module
from ursa.training.checkpoint import latest_checkpoint, load_checkpoint
from ursa.training.distributed import Group, local_part
from ursa.training.execution import Execution
from ursa.training.guard import SkippedSteps
from ursa.training.samples import step_folder
from ursa.training.stage import _stage_uri, samples_uri, stage_fingerprint

SETTINGS = {
    "max_steps": 10,
    "warmup_steps": 5,
    "checkpoint_every": 4,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "validate_every": 5,
    "max_grad_norm": 0.5,
    "sample_every": 5,
}
MODES = {
    "alone": {},
    "replicated": {"ranks": 2},
    "fsdp": {"ranks": 2, "strategy": "fsdp"},
}


@pytest.fixture(scope="module")
def warm():
    with warm_process() as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> factories.TinyData:
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("data")))


class Case:
    """One stage in an output directory of its own."""

    def __init__(self, warm: Warm, data: factories.TinyData, folder: Path, **changes) -> None:
        self.warm, self.folder, self.log = warm, folder, folder / "log"
        folder.mkdir()
        self.request: StageRequest = factories.stage_request(
            data, "async_finetune", str(folder), **(SETTINGS | changes)
        )

    def run(self, mode: str, *faults: Fault) -> Outcome:
        return self.warm.run(self.request, self.log, *faults, **MODES[mode])

    def finished(self, mode: str, *faults: Fault) -> Trace:
        outcome = self.run(mode, *faults)
        ranks = MODES[mode].get("ranks", 1)
        assert outcome.exits == [0] * ranks, outcome.output
        return trace(self.request, self.log, ranks)

    def skipped(self) -> SkippedSteps:
        found = latest_checkpoint(
            _stage_uri(self.request), fingerprint=stage_fingerprint(self.request)
        )
        assert found is not None
        return found[1].skipped


@pytest.fixture(scope="module")
def make_case(warm, data, tmp_path_factory):
    return lambda **changes: Case(warm, data, tmp_path_factory.mktemp("case") / "out", **changes)


@pytest.fixture(scope="module")
def straight(make_case) -> dict[str, Trace]:
    return {mode: make_case().finished(mode) for mode in MODES}


def assert_same_state(one: Trace, other: Trace) -> None:
    """Names, order, types and shapes are equal, numbers to rounding."""
    states = [load_checkpoint(each.checkpoint.uri)[1] for each in (one, other)]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["alone", "replicated"])
def test_sharded_learns_what_replicated_learns(straight, mode):
    sharded, other = straight["fsdp"], straight[mode]
    assert sharded.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert_same_state(sharded, other)
    for name, value in other.checkpoint.metrics.items():
        assert sharded.checkpoint.metrics[name] == pytest.approx(value, rel=1e-4), name
    for found, expected in zip(
        sharded.checkpoint.loss_curve, other.checkpoint.loss_curve, strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4)


def test_all_ranks_draw_samples_of_shards_together(make_case):
    """Each holds a part of the weights: no rank draws alone, and one writes."""
    case = make_case(max_steps=5)
    case.finished("fsdp")
    folder = storage.local_path(step_folder(samples_uri(case.request), 5))
    assert {path.name for path in folder.iterdir()} == {"0.mp4", "1.mp4", SAMPLES_PICTURE}


@pytest.mark.parametrize("before", MODES)
def test_a_stage_goes_on_in_another_mode(make_case, straight, before):
    """Half in one mode, the rest in each of the others."""
    for after in MODES:
        if "fsdp" not in {before, after} or before == after:
            continue
        case = make_case()
        stop: Fault = {"kind": "term_forward", "number": 11, "rank": 0}
        assert set(case.run(before, stop).exits) == {143}
        case.log.write_text("")  # the batches are split in another way from here on
        rest = case.finished(after)
        assert list(rest.steps) == list(range(6, SETTINGS["max_steps"]))
        assert rest.losses() == pytest.approx(straight["replicated"].losses()[6:], rel=1e-5)
        assert_same_state(rest, straight["fsdp"])


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_sharded_stage_is_equal_to_the_bit(make_case, straight, rank):
    case = make_case()
    outcome = case.run("fsdp", {"kind": "kill_forward", "number": 14, "rank": rank})
    assert outcome.exits[rank] == -9
    assert not outcome.hung
    done = case.finished("fsdp")
    assert done.steps == straight["fsdp"].steps
    assert done.sha256 == straight["fsdp"].sha256


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["nan_loss", "nan_grad", "nan_weight", "nan_average"])
def test_numbers_that_are_not_finite_on_any_rank(make_case, kind, rank):
    """Skipped, or taken back, as when each rank holds everything."""
    outcomes = []
    for mode in ("replicated", "fsdp"):
        case = make_case()
        done = case.finished(mode, {"kind": kind, "steps": (4,), "rank": rank})
        outcomes.append((case.skipped(), done.losses()))
    (skipped, losses), (sharded_skipped, sharded_losses) = outcomes
    assert skipped.number() > 0
    assert sharded_skipped == skipped
    assert sharded_losses == pytest.approx(losses, rel=1e-5)


def test_bfloat16_on_shards(make_case, straight):
    done = make_case(precision="bfloat16").finished("fsdp")
    assert done.losses() != straight["fsdp"].losses()
    assert done.losses() == pytest.approx(straight["fsdp"].losses(), rel=1e-2)
    replicated = make_case(precision="bfloat16").finished("replicated")
    assert done.losses() == pytest.approx(replicated.losses(), rel=1e-2)
    for name, value in load_checkpoint(done.checkpoint.uri)[1].items():
        assert value.dtype == (torch.int64 if name == "ema_num_averaged" else torch.float32), name


def test_a_rank_holds_its_part_alone(data, tmp_path):
    """Of weights and average, on one rank of four whose messages go nowhere."""
    request = factories.stage_request(data, "async_finetune", str(tmp_path))
    whole = stage_module._build_trainer(request, Group(0, 4))
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        sharded = stage_module._build_trainer(request, Group(0, 4), Execution(strategy="fsdp"))
        for one, all_of_it in (
            (sharded.model, whole.model),
            (sharded.average.module, whole.average.module),
        ):
            held, total = (
                sum(local_part(value).numel() for value in model.parameters())
                for model in (one, all_of_it)
            )
            assert total / 4 <= held < 1.01 * total / 4
        of_optimizer = {id(p) for group in sharded.optimizer.param_groups for p in group["params"]}
        assert of_optimizer == {id(parameter) for parameter in sharded.model.parameters()}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def adapted(make_case, straight):
    """A stage that trains adapters and the head, in each mode."""
    base = straight["alone"].checkpoint
    lora = {"rank": 3, "dropout": 0.2, "whole_modules": ["lm_head"]}
    changes = {"lora": lora, "learning_rate": 1e-2, "init_from": base}
    cases = {mode: make_case(**changes) for mode in MODES}
    return {mode: case.finished(mode) for mode, case in cases.items()}, changes


@pytest.mark.parametrize("mode", ["alone", "replicated"])
def test_sharded_adapters_learn_what_replicated_ones_learn(adapted, mode):
    traces, _ = adapted
    sharded, other = traces["fsdp"], traces[mode]
    assert sharded.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert other.losses()[-1] != other.losses()[0]
    assert_same_state(sharded, other)
    one, two = (load_checkpoint(each.checkpoint.merged_uri)[1] for each in (sharded, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
    for name, value in other.checkpoint.metrics.items():
        assert sharded.checkpoint.metrics[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("mode", ["replicated", "fsdp"])
def test_killed_adapters_on_two_ranks_are_equal_to_the_bit(make_case, adapted, mode):
    traces, changes = adapted
    case = make_case(**changes)
    assert case.run(mode, {"kind": "kill_forward", "number": 14, "rank": 1}).exits[1] == -9
    done = case.finished(mode)
    assert done.steps == traces[mode].steps
    assert done.sha256 == traces[mode].sha256


def test_adapters_on_shards_in_bfloat16_and_nan_on_one_rank(make_case, adapted):
    traces, changes = adapted
    case = make_case(**changes, precision="bfloat16")
    fault: Fault = {"kind": "nan_loss", "steps": (4,), "rank": 1}
    done = case.finished("fsdp", fault)
    assert case.skipped().steps == (4,)
    others = [loss for step, loss in enumerate(traces["fsdp"].losses()) if step != 4]
    assert done.losses() != others
    assert done.losses()[:4] == pytest.approx(others[:4], rel=1e-2)
