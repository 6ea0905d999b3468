import math

import numpy as np
import pytest
import torch

from ursa.diffusion.schedule import PowerSchedule, TabulatedSchedule
from ursa.errors import ConfigError

POWER = PowerSchedule(0.8, 1.8)
LOGITS = np.linspace(-9.2, 9.2, 129)
LINE = TabulatedSchedule((math.log(1.8) + 0.8 * LOGITS).tolist(), max_logit=9.2)
BENT = TabulatedSchedule((LOGITS + 0.3 * np.tanh(LOGITS)).tolist(), max_logit=9.2)
TIMES = torch.tensor([1e-7, 1e-4, 0.01, 0.3, 0.5, 0.77, 0.99, 0.9999, 1 - 1e-7]).double()


def test_a_table_of_a_power_is_the_power_also_beyond_its_ends():
    torch.testing.assert_close(LINE.beta(TIMES), POWER.beta(TIMES), rtol=1e-9, atol=0)
    torch.testing.assert_close(LINE.rate(TIMES), POWER.rate(TIMES), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [POWER, LINE, BENT], ids=["power", "line", "bent"])
def test_schedules_rise_from_zero_and_the_rate_is_their_slope(schedule):
    assert float(schedule.beta(torch.zeros(()))) == 0
    assert schedule.beta(torch.zeros(3)).dtype == torch.float32
    t = torch.linspace(0, 0.9995, 400, dtype=torch.float64)
    assert (schedule.beta(t).diff() > 0).all()
    middle = TIMES[1:-1]
    step = 1e-6 * middle * (1 - middle)
    slope = (schedule.beta(middle + step) - schedule.beta(middle - step)) / (2 * step)
    torch.testing.assert_close(schedule.rate(middle), slope, rtol=1e-6, atol=0)


def test_a_table_moves_at_the_start_where_a_power_rests():
    zero = torch.zeros((), dtype=torch.float64)
    assert float(POWER.rate(zero)) == 0
    assert math.isfinite(float(BENT.rate(zero)))
    assert float(BENT.rate(zero)) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerSchedule(0, 1), "alpha and c must be positive"),
        (lambda: PowerSchedule(1, math.inf), "alpha and c must be positive"),
        (lambda: TabulatedSchedule([0, 1, 2], max_logit=1), "at least 4 finite numbers, got 3"),
        (
            lambda: TabulatedSchedule([0, 1, 1, 2], max_logit=1),
            "must rise, got 1 and 1 at places 1",
        ),
        (lambda: TabulatedSchedule([0, 1, 2, 3], max_logit=0), "max_logit must be positive"),
    ],
)
def test_schedules_that_do_not_fit_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
