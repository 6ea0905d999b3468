import pytest
import torch

from ursa.diffusion.timesteps import expand_time, inference_times, shift_time, training_times
from ursa.errors import ConfigError


def test_grid_without_and_with_shift():
    assert inference_times(4, 1.0).tolist() == [0.0, 0.25, 0.5, 0.75]
    # t = 1 - 3 sigma / (1 + 2 sigma)
    assert inference_times(4, 3.0).tolist() == pytest.approx([0.0, 0.1, 0.25, 0.5])
    assert inference_times(1, 3.0).tolist() == [0.0]


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_shifts_that_make_no_sense_are_refused(shift):
    for call in (
        lambda: inference_times(4, shift),
        lambda: training_times(torch.zeros(2), shift),
        lambda: shift_time(torch.zeros(2), shift),
    ):
        with pytest.raises(ConfigError, match="shift must be a positive number"):
            call()


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_grid_has_a_step(num_steps):
    with pytest.raises(ConfigError, match=f"at least 1, got {num_steps}"):
        inference_times(num_steps, 1.0)


def test_training_times_keep_the_shape_that_shares_them():
    tokens = torch.zeros(2, 3, 4, 6, dtype=torch.long)
    for shape, full in [((2,), (2, 1, 1, 1)), ((2, 3), (2, 3, 1, 1))]:
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        t = training_times(uniform, 3.0)
        assert t.shape == shape
        laid = expand_time(t, tokens)
        assert laid.shape == full
        assert torch.equal(laid.flatten(), t.flatten())


def test_a_plain_number_keeps_its_precision():
    t = expand_time(0.1, torch.zeros(2, 3, dtype=torch.long))
    assert t.dtype == torch.float64
    assert t.tolist() == [[0.1]]
