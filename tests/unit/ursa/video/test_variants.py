import numpy as np

from ursa.video.variants import ZOOM, shrink, vary


def frames(height=16, width=24):
    rows, columns = np.mgrid[0 : ZOOM * height, 0 : ZOOM * width]
    picture = np.stack([rows * 7 % 256, columns * 5 % 256, (rows + columns) % 256], axis=-1)
    return np.stack([picture, picture]).astype(np.uint8)


def test_shape_and_dtype_are_those_of_a_sample():
    varied = vary(frames(), seed=1)
    assert varied.shape == (2, 16, 24, 3)
    assert varied.dtype == np.uint8


def test_a_seed_decides_the_variant_and_all_frames_change_alike():
    assert (vary(frames(), seed=3) == vary(frames(), seed=3)).all()
    assert any((vary(frames(), seed=3) != vary(frames(), seed=s)).any() for s in range(4, 8))
    varied = vary(frames(), seed=3)
    assert (varied[0] == varied[1]).all()


def test_input_is_left_alone():
    given = frames()
    before = given.copy()
    for seed in range(8):
        vary(given, seed=seed)
    assert (given == before).all()


def test_shrink_averages_squares():
    small = shrink(frames())
    assert small.shape == (2, 16, 24, 3)
    assert small[0, 0, 0, 0] == round(float(frames()[0, :2, :2, 0].mean()))
