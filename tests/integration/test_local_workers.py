import pytest
import torch

from tests import factories
from ursa.errors import TrainingError
from ursa.training.checkpoint import load_checkpoint
from ursa.training.stage import find_stage, launch_local


@pytest.mark.parametrize("stage", ["async_finetune"])
def test_two_workers_learn_what_one_learns(make_request, stage, tmp_path):
    changes = {"max_steps": 20, "checkpoint_every": 20, "validate_every": 20}
    curves, states = [], []
    for num_workers in (1, 2):
        request = make_request(stage, output=f"w{num_workers}", **changes)
        metrics = factories.MetricsFile(tmp_path / f"w{num_workers}.jsonl")
        checkpoint = launch_local(request, num_workers=num_workers, on_metrics=metrics.on_metrics)
        assert checkpoint == find_stage(request)
        assert [row["step"] for row in metrics.rows()] == list(range(1, 21))
        curves.append(metrics.losses())
        states.append(load_checkpoint(checkpoint.uri)[1])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-3)


def test_error_of_a_worker_is_passed_on(make_request):
    request = make_request(global_batch_size=3)
    with pytest.raises(TrainingError, match="3 must be divisible by the 2 workers"):
        launch_local(request, num_workers=2)
    assert find_stage(request) is None
