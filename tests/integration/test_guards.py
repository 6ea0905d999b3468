"""Numbers that are not finite, put into real processes: no checkpoint ever holds one."""

import pytest
import torch

from tests import factories
from tests.warm import Fault, trace, warm_process
from ursa import storage
from ursa.training.checkpoint import _committed, load_checkpoint
from ursa.training.stage import _stage_uri, find_stage

SETTINGS = {"max_steps": 10, "warmup_steps": 3, "checkpoint_every": 3, "keep_checkpoints": 2}
KILLED = -9


@pytest.fixture(scope="module")
def warm():
    with warm_process() as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> factories.TinyData:
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("data")), num_validation=2)


@pytest.fixture
def run(warm, data, tmp_path):
    """A function that trains the stage in a directory; returns how that ended, request and log."""

    def run_stage(name: str, *faults: Fault, **options):
        request = factories.stage_request(data, "async_finetune", str(tmp_path / name), **SETTINGS)
        log = tmp_path / f"{name}.jsonl"
        outcome = warm.run(request, log, *faults, **options)
        assert not outcome.hung
        assert outcome.seconds < 60
        assert_finite(request)
        return outcome, request, log

    return run_stage


def assert_finite(request) -> None:
    for uri, _ in _committed(_stage_uri(request)):
        for name, value in load_checkpoint(uri)[1].items():
            assert torch.isfinite(value).all(), (uri, name)


def spoil(kind: str, *steps: int, rank: int = 0) -> Fault:
    return {"kind": kind, "steps": steps, "rank": rank}


def skipped(request):
    return load_checkpoint(find_stage(request).uri)[0].skipped


@pytest.mark.parametrize("kind", ["nan_loss", "nan_grad"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(run, kind, ranks, rank):
    outcome, request, log = run("out", spoil(kind, 4, rank=rank), ranks=ranks)
    assert outcome.exits == [0] * ranks, outcome.output
    done = trace(request, log, ranks)
    assert list(done.steps) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert skipped(request).steps == (4,)
    assert skipped(request).taken_back is None
    assert done.checkpoint.metrics["train/skipped_steps"] == 1
    assert f"skipped: stage async_finetune, step 4: loss {'nan' if kind == 'nan_loss' else ''}" in (
        outcome.output
    )
    whole, other, _ = run("whole", ranks=ranks)
    assert whole.exits == [0] * ranks
    assert find_stage(other).metrics["train/skipped_steps"] == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_skipped_steps_go_back_and_resume_equal(run, ranks):
    """Back to the checkpoint of step 3: 4 is the first of three skipped ones."""
    faults = [spoil("nan_grad", 4, 6, 7, rank=ranks - 1)]
    outcome, request, log = run("whole", *faults, ranks=ranks)
    assert outcome.exits == [0] * ranks, outcome.output
    assert skipped(request).steps == (4, 6, 7)
    assert skipped(request).taken_back == (3, 8)
    assert "goes back to the weights of step 3 and leaves out steps 3 to 7" in outcome.output
    whole = trace(request, log, ranks)
    assert list(whole.steps) == [0, 1, 2, 3, 5, 8, 9]
    assert whole.checkpoint.metrics["train/skipped_steps"] == 5

    for number in (5, 6, 9, 10):  # before, amid and after the trouble; each step has one forward
        kill = {"kind": "kill_forward", "number": number, "rank": ranks - 1}
        name = f"killed-{number}"
        outcome, request, log = run(name, *faults, kill, ranks=ranks)
        assert outcome.exits[ranks - 1] == KILLED
        outcome, request, log = run(name, *faults, ranks=ranks)
        assert outcome.exits == [0] * ranks, outcome.output
        again = trace(request, log, ranks)
        assert (again.sha256, again.steps) == (whole.sha256, whole.steps)
        assert skipped(request).taken_back == (3, 8)

    # a checkpoint that SIGTERM has made does not change what the stage goes back to
    stop = {"kind": "term_forward", "number": 4, "rank": 0}
    outcome, _, _ = run("stopped", *faults, stop, ranks=ranks)
    assert outcome.exits == [143] * ranks, outcome.output
    outcome, request, log = run("stopped", *faults, ranks=ranks)
    assert trace(request, log, ranks).sha256 == whole.sha256
    assert skipped(request).taken_back == (3, 8)


def test_the_second_time_the_stage_stops_and_says_what_to_do(run):
    steps = (1, 2, 3, 6, 7, 8)
    outcome, request, _ = run("out", spoil("nan_loss", *steps))
    assert outcome.exits == [1]
    assert find_stage(request) is None
    for text in (
        "goes back to the weights of step 0 and leaves out steps 0 to 3",
        "not finite again at steps 6, 7, 8, after steps 0 to 3 were taken back",
        "lower stages.async_finetune.learning_rate 0.003, raise its warmup_steps",
    ):
        assert text in outcome.output
    # the last good checkpoint is there; what is not finite is found again after it
    outcome, request, _ = run("out", spoil("nan_loss", *steps))
    assert outcome.exits == [1]
    outcome, request, log = run("out")
    assert outcome.exits == [0]
    assert list(trace(request, log).steps)[-1] == 9


@pytest.mark.parametrize("kind", ["nan_weight", "nan_average", "nan_moment"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_spoilt_weights_are_replaced_at_once(run, kind, ranks, rank):
    """Weights at the step that reads them; average and moments before the next checkpoint."""
    outcome, request, _ = run("out", spoil(kind, 4, rank=rank), ranks=ranks)
    assert outcome.exits == [0] * ranks, outcome.output
    end = 5 if kind == "nan_weight" else 6
    assert skipped(request).taken_back == (3, end)
    assert skipped(request).steps == ((4,) if kind == "nan_weight" else ())
    assert find_stage(request).metrics["train/skipped_steps"] == end - 3


def test_weights_of_before_the_first_checkpoint_are_those_of_the_start(run):
    outcome, request, log = run("out", spoil("nan_weight", 1))
    assert outcome.exits == [0], outcome.output
    assert skipped(request).taken_back == (0, 2)
    other, start, _ = run("start")
    assert other.exits == [0]
    assert trace(request, log).steps[0] == trace(start, log.with_name("start.jsonl")).steps[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_fails_is_raised_at_the_next_step(run, ranks):
    outcome, request, log = run("out", {"kind": "fail_save", "number": 2}, ranks=ranks)
    assert outcome.exits == [1] * ranks
    assert "StorageConfigurationError: disk full at " in outcome.output
    assert [step for _, step in _committed(_stage_uri(request))] == [3]
    steps = [line for line in log.read_text().splitlines() if '"rank": 0' in line]
    assert 6 <= len(steps) <= 9  # the next checkpoint waits for this one
    outcome, request, log = run("out", ranks=ranks)
    assert outcome.exits == [0] * ranks
    whole, other, other_log = run("whole", ranks=ranks)
    assert whole.exits == [0] * ranks
    assert trace(request, log, ranks).sha256 == trace(other, other_log, ranks).sha256


def test_a_slow_store_holds_back_only_the_next_checkpoint(run):
    outcome, request, _ = run("out", {"kind": "slow_save", "seconds": 0.2})
    assert outcome.exits == [0], outcome.output
    files = [item.uri for item in storage.list_files(_stage_uri(request))]
    assert sum(uri.endswith("COMMITTED.json") for uri in files) == SETTINGS["keep_checkpoints"]
