"""Stages that are killed anywhere, in real processes, and end as if nothing had happened."""

import random
from itertools import count
from pathlib import Path

import pytest

from tests import factories
from tests.warm import Fault, Trace, Warm, trace, warm_process
from ursa.config import STAGES
from ursa.training.checkpoint import latest_checkpoint, load_checkpoint
from ursa.training.stage import _stage_uri, stage_fingerprint

# the warm-up ends at step 5, a checkpoint comes every 4 steps, a batch has two parts
SETTINGS = {
    "max_steps": 10,
    "warmup_steps": 5,
    "checkpoint_every": 4,
    "keep_checkpoints": 1,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
}
FORWARDS = SETTINGS["max_steps"] * SETTINGS["gradient_accumulation_steps"]
KILLED = -9
POINTS = ("upload", "uploaded", "committed", "removing")


@pytest.fixture(scope="module")
def warm():
    with warm_process() as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> factories.TinyData:
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("data")), num_validation=0)


class Chain:
    """The three stages in one output directory, each with its own faults."""

    def __init__(self, warm: Warm, data: factories.TinyData, folder: Path, **options) -> None:
        self.warm, self.data, self.folder, self.options = warm, data, folder, options
        self.folder.mkdir()

    def run(self, *faults: Fault, stages=STAGES, parent=None, **changes) -> dict[str, Trace]:
        """Do each stage with one fault after the other, then without; return the traces."""
        traces: dict[str, Trace] = {}
        for stage in stages:
            request = factories.stage_request(
                self.data, stage, str(self.folder), init_from=parent, **(SETTINGS | changes)
            )
            log = self.folder / f"{stage}.jsonl"
            for fault in faults:
                outcome = self.warm.run(request, log, fault, **self.options)
                self.check(fault, outcome)
                latest = latest_checkpoint(
                    _stage_uri(request), fingerprint=stage_fingerprint(request)
                )
                # whatever was killed, what was committed can be read
                assert latest is not None or "forward" in fault["kind"] or fault["number"] == 1
            outcome = self.warm.run(request, log, **self.options)
            assert outcome.exits == [0] * self.options.get("ranks", 1), outcome.output
            traces[stage] = trace(request, log, self.options.get("ranks", 1))
            parent = traces[stage].checkpoint
        return traces

    def check(self, fault: Fault, outcome) -> None:
        assert not outcome.hung
        expected = 143 if fault["kind"] == "term_forward" else KILLED
        assert outcome.exits[fault.get("rank", 0)] == expected, outcome.output
        if fault["kind"] == "term_forward":
            assert set(outcome.exits) == {143}
            assert outcome.signal_s < 20


def assert_equal(one: dict[str, Trace], other: dict[str, Trace]) -> None:
    for stage, expected in other.items():
        assert len(expected.steps) == SETTINGS["max_steps"]
        assert one[stage].steps == expected.steps, stage
        assert one[stage].sha256 == expected.sha256, stage


def kill(number: int, rank: int = 0) -> Fault:
    return {"kind": "kill_forward", "number": number, "rank": rank}


def terminate(number: int, rank: int = 0) -> Fault:
    return {"kind": "term_forward", "number": number, "rank": rank}


@pytest.fixture(scope="module")
def chain(warm, data, tmp_path_factory):
    """A function that makes chains, and the undisturbed one to compare with, by its options."""
    root, names, straight = tmp_path_factory.mktemp("chains"), count(), {}

    def make(**options) -> Chain:
        return Chain(warm, data, root / str(next(names)), **options)

    def undisturbed(**options) -> dict[str, Trace]:
        key = tuple(sorted(options.items()))
        if key not in straight:
            straight[key] = make(**options).run()
        return straight[key]

    make.undisturbed = undisturbed
    return make


@pytest.mark.parametrize("fault", [kill(13), {"kind": "kill_save", "number": 2, "point": "upload"}])
def test_killed_stages_are_equal_to_the_bit(chain, fault):
    """In the middle of a batch, after the checkpoint of step 4; and in the middle of that of 8."""
    assert_equal(chain().run(fault), chain.undisturbed())


def test_sigterm_to_one_of_two_ranks(chain, warm):
    stages = STAGES[2:]
    one = chain(ranks=2).run(terminate(7, rank=1), kill(9, rank=1), stages=stages)
    assert_equal(one, chain(ranks=2).run(stages=stages))


LORA = {"rank": 3, "dropout": 0.2, "whole_modules": ["lm_head"]}


@pytest.mark.parametrize("fault", [kill(13), {"kind": "kill_save", "number": 2, "point": "upload"}])
def test_killed_stages_with_adapters_are_equal_to_the_bit(chain, data, fault):
    """Masks of dropout too: nothing of a generator is kept."""
    base = chain.undisturbed()["image_pretrain"].checkpoint
    results = []
    for faults in ((), (fault,)):
        one = chain()
        results.append(one.run(*faults, stages=STAGES[1:2], parent=base, lora=LORA))
    (straight,), (killed,) = (result.values() for result in results)
    assert_equal({"it": killed}, {"it": straight})
    one, other = (
        load_checkpoint(each.checkpoint.merged_uri)[0].state_sha256 for each in (straight, killed)
    )
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_steps(chain, seed):
    """With the three stages of a chain 30 kills; every third chain is killed twice a stage."""
    draw = random.Random(seed)
    faults = [kill(draw.randint(1, FORWARDS))]
    if seed % 3 == 0:
        faults.append(kill(draw.randint(1, 8)))
    assert_equal(chain().run(*faults), chain.undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_while_a_checkpoint_is_written(chain, number, point):
    if (number, point) == (1, "removing"):
        pytest.skip("the first removes none")
    fault = {"kind": "kill_save", "number": number, "point": point}
    assert_equal(chain().run(fault), chain.undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sigterm_at_random_steps(chain, seed):
    number = random.Random(100 + seed).randint(1, FORWARDS)
    stages = STAGES[seed % 3 :][:1]
    one = chain().run(terminate(number), stages=stages)
    assert_equal(one, chain().run(stages=stages))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [kill, terminate])
def test_two_ranks(chain, fault, rank):
    number = random.Random(f"{fault.__name__} {rank}").randint(5, FORWARDS)
    assert_equal(chain(ranks=2).run(fault(number, rank)), chain.undisturbed(ranks=2))


@pytest.mark.slow
def test_two_threads(chain):
    assert_equal(chain(threads=2).run(kill(11)), chain.undisturbed(threads=2))


@pytest.mark.slow
def test_two_ranks_go_on_as_one(chain, warm, data, tmp_path):
    """Half of a stage on two ranks, the rest on one: the curve of one rank throughout."""
    alone = chain.undisturbed()["image_pretrain"]
    request = factories.stage_request(data, "image_pretrain", str(tmp_path / "both"), **SETTINGS)
    log = tmp_path / "log"
    assert warm.run(request, log, terminate(10), ranks=2).exits == [143, 143]
    log.write_text("")
    assert warm.run(request, log).exits == [0]
    rest = trace(request, log)
    assert list(rest.steps) == list(range(5, SETTINGS["max_steps"]))
    assert rest.losses() == pytest.approx(alone.losses()[5:], rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_a_batch_and_ranks_give_one_curve(chain, ranks):
    curves = [
        chain(ranks=ranks)
        .run(stages=STAGES[:1], gradient_accumulation_steps=parts)["image_pretrain"]
        .losses()
        for parts in (1, 2, 4)
    ]
    expected = chain.undisturbed()["image_pretrain"].losses()
    assert curves == [pytest.approx(expected, rel=1e-5)] * 3
