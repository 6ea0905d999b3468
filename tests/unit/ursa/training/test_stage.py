import functools
import os
import signal

import pytest
import torch

from tests import factories
from ursa import storage
from ursa.artifacts import TokenizerRef
from ursa.errors import (
    CheckpointError,
    ConfigError,
    DataExhaustedError,
    NonFiniteLossError,
    ShardFormatError,
)
from ursa.training import stage as stage_module
from ursa.training.checkpoint import load_checkpoint
from ursa.training.distributed import Group
from ursa.training.schedule import build_path
from ursa.training.stage import find_stage, load_average, train_stage

# fmt: off
GOLDEN_LOSSES = [
    4.106368, 4.065113, 4.085559, 4.018677, 4.013111, 4.055193, 3.996985,
    3.946855, 3.856944, 3.903564, 3.771265, 3.876563, 3.850432, 3.851750,
    3.924265, 3.906232, 3.862374, 3.765320, 3.724211, 3.846056,
]
# fmt: on


class InterruptedRunError(Exception):
    """Stands for the death of the process in the middle of a stage."""


def stop_at(last, losses):
    def on_metrics(step, metrics):
        losses.append(metrics["train/loss"])
        if step == last:
            raise InterruptedRunError

    return on_metrics


def collect(losses):
    return lambda _step, metrics: losses.append(metrics["train/loss"])


def state_of(checkpoint):
    return load_checkpoint(checkpoint.uri)[1]


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


@pytest.mark.parametrize("stage", ["image_pretrain", "video_pretrain", "async_finetune"])
def test_resumed_run_is_equal_to_the_bit(make_request, stage):
    straight: list[float] = []
    whole = train_stage(make_request(stage, output="a"), on_metrics=collect(straight))

    request, losses = make_request(stage, output="b"), []
    with pytest.raises(InterruptedRunError):
        # the checkpoint of step 3 is there; steps 4 and 5 are lost and done again
        train_stage(request, on_metrics=stop_at(5, losses))
    assert find_stage(request) is None
    del losses[3:]
    resumed = train_stage(request, on_metrics=collect(losses))

    assert losses == straight
    assert len(straight) == 6
    assert_same_state(state_of(resumed), state_of(whole))
    assert resumed.metrics == whole.metrics
    kinds = {name.split(".")[0] for name in state_of(whole)}
    assert kinds == {"model", "ema", "ema_num_averaged", "optimizer"}


def test_committed_stage_is_not_done_again(make_request):
    request = make_request(max_steps=2)
    first = train_stage(request)
    calls: list[float] = []
    assert train_stage(request, on_metrics=collect(calls)) == first == find_stage(request)
    assert calls == []
    assert (first.step, first.num_samples_seen, first.parent_uri) == (2, 8, None)


def test_killed_between_the_last_checkpoint_and_the_manifest(make_request):
    request, calls = make_request(), []
    whole = train_stage(request)
    storage.remove_file(stage_module._manifest_uri(request))
    again = train_stage(request, on_metrics=collect(calls))
    assert again == whole
    assert whole.metrics["train/loss"] > 0
    assert "val/loss" in whole.metrics
    assert calls == []


def test_a_stage_starts_from_the_average_of_its_parent(make_request):
    parent = train_stage(make_request("image_pretrain"))
    request = make_request("video_pretrain", init_from=parent)
    child = stage_module._build_trainer(request, Group(0, 1)).model
    average = load_average(parent, request)
    for name, value in child.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    raw = {k.removeprefix("model."): v for k, v in state_of(parent).items() if k[:6] == "model."}
    assert any(not torch.equal(value, raw[name]) for name, value in child.state_dict().items())
    assert train_stage(request).parent_uri == parent.uri


def test_parent_of_another_model_is_refused(make_request):
    parent = train_stage(make_request("image_pretrain", max_steps=1))
    request = make_request(init_from=parent, config={"model": {"num_layers": 3}})
    for use in (train_stage, functools.partial(load_average, parent)):
        with pytest.raises(CheckpointError, match="does not fit the model of this run; give the"):
            use(request)


def test_changed_settings_do_not_resume(make_request):
    request = make_request()
    with pytest.raises(InterruptedRunError):
        train_stage(request, on_metrics=stop_at(4, []))
    changed = make_request(learning_rate=1e-3)
    steps: list[int] = []
    train_stage(changed, on_metrics=lambda step, _: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_losses_of_a_known_run(make_request):
    """A refactor may not change these; a change of the maths updates them with a reason."""
    losses: list[float] = []
    request = make_request(
        "async_finetune", max_steps=20, checkpoint_every=20, synchronous_fraction=0.5
    )
    train_stage(request, on_metrics=collect(losses))
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-4)


def test_it_learns(make_request):
    rows: list[dict] = []
    request = make_request(
        max_steps=60, checkpoint_every=60, validate_every=60, ema_decay=0.5, learning_rate=1e-2
    )
    train_stage(request, on_metrics=lambda _, metrics: rows.append(dict(metrics)))
    first, last = rows[0], rows[-1]
    assert first["train/loss"] == pytest.approx(4.094, abs=0.1)  # ln 60: knows nothing
    assert last["train/loss"] < 0.85 * first["train/loss"]
    assert last["val/loss_t0.9"] < last["val/loss_t0.5"] < last["val/loss_t0"]
    assert last["train/samples_seen"] == 240
    assert {"train/lr", "train/grad_norm", "train/accuracy", "train/tokens_per_s"} <= last.keys()


def test_sigterm_saves_first(make_request):
    request, steps = make_request(max_steps=12, checkpoint_every=12), []

    def terminate(step, _metrics):
        steps.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train_stage(request, on_metrics=terminate)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    train_stage(request, on_metrics=lambda step, _: steps.append(step))
    assert steps == list(range(1, 13))


def test_divergence_stops_before_the_update(make_request, monkeypatch):
    request = make_request()
    trainer = stage_module._build_trainer(request, Group(0, 1))
    trainer.step(0)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.inf
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss .*learning_rate 0.003"):
        trainer.step(1)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_no_samples_is_an_error_that_says_what_to_do(make_request, tmp_path):
    request = make_request()
    empty = request.datasets.video_train.model_copy(update={"shards": (), "num_samples": 0})
    datasets = request.datasets.model_copy(update={"video_train": empty})
    with pytest.raises(DataExhaustedError, match="no train video samples; loosen"):
        train_stage(request.model_copy(update={"datasets": datasets}))


@pytest.mark.usefixtures("no_threads_left")
def test_a_damaged_shard_ends_the_stage_with_its_own_message(make_request, tmp_path):
    dataset = factories.write_dataset(str(tmp_path / "data"), "video", "train", 8)
    storage.write_bytes(dataset.shards[1].uri, b"damaged")
    request = make_request()
    datasets = request.datasets.model_copy(update={"video_train": dataset})
    request = request.model_copy(update={"datasets": datasets})
    with pytest.raises(ShardFormatError, match=f"{dataset.shards[1].uri}: sha256 is"):
        train_stage(request)
    assert find_stage(request) is None


def test_without_held_out_samples_there_is_no_validation(make_request):
    request = make_request(max_steps=2)
    empty = request.datasets.video_validation.model_copy(update={"shards": (), "num_samples": 0})
    datasets = request.datasets.model_copy(update={"video_validation": empty})
    metrics = train_stage(request.model_copy(update={"datasets": datasets})).metrics
    assert not [name for name in metrics if name.startswith("val/")]


def test_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match="4 must be divisible by the 3 workers"):
        Group(1, 3).share(4)


def test_fixed_schedule_is_as_given(make_request):
    path = build_path(make_request(config={"path": {"alpha": 0.7, "c": 3.5}}))
    assert (path.schedule.alpha, path.schedule.c) == (0.7, 3.5)
    assert path.codebook_size == factories.CODEBOOK_SIZE


def test_missing_tokenizer_is_named(make_request, tmp_path):
    request = make_request()
    gone: TokenizerRef = request.text_tokenizer.model_copy(
        update={"directory_uri": str(tmp_path / "gone")}
    )
    with pytest.raises(ConfigError, match="no text tokenizer at"):
        train_stage(request.model_copy(update={"text_tokenizer": gone}))
