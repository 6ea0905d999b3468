import io

import numpy as np
from PIL import Image

from ursa.artifacts import Measurements
from ursa.evaluation.measures import group_cases, mean_measure
from ursa.evaluation.picture import draw_curves

GROUP = group_cases("t2v", [f"case {number}" for number in range(8)], ())


def width(names, num_steps=25):
    measures = tuple(mean_measure(name, np.arange(8.0), GROUP) for name in names)
    found = draw_curves(Measurements(measures=measures, cases=(GROUP,)), num_steps=num_steps)
    return None if found is None else Image.open(io.BytesIO(found)).width


def test_a_curve_needs_two_points():
    one = width(["asked2_motion", "asked8_motion"])
    two = width(["asked2_motion", "asked8_motion", "i2v_later_psnr", "steps4_i2v_later_psnr"])
    assert two == 2 * one
    assert width(["asked2_motion", "i2v_later_psnr", "t2v_motion"]) is None
