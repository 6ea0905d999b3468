from hypothesis import given
from hypothesis import strategies as st

from ursa.training.guard import WINDOW_STEPS, SkippedSteps


def test_only_the_last_steps_count():
    skipped = SkippedSteps(steps=(0, 5, 99, 100))
    assert skipped.recent(100) == (0, 5, 99, 100)
    assert skipped.recent(101) == (5, 99, 100)
    assert skipped.recent(300) == ()
    assert skipped.with_step(101).recent(102) == (5, 99, 100, 101)


def test_what_was_taken_back_does_not_count_again():
    skipped = SkippedSteps(steps=(4, 6, 7), taken_back=(3, 8))
    assert skipped.recent(9) == ()
    assert skipped.with_step(9).recent(10) == (9,)
    assert skipped.number() == 5
    assert skipped.with_step(9).number() == 6
    assert SkippedSteps(steps=(1, 4), taken_back=(3, 8)).number() == 6


@given(st.sets(st.integers(0, 400)), st.integers(0, 400))
def test_the_window_has_the_length_that_it_says(steps, count):
    recent = SkippedSteps(steps=tuple(sorted(steps))).recent(count)
    assert all(step >= count - WINDOW_STEPS for step in recent)
    assert SkippedSteps().number() == 0
