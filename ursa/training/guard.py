"""When a stage skips a step, and when it goes back: pure rules over what a checkpoint remembers.

A step whose loss or gradient is not finite changes nothing and is counted. `MAX_SKIPPED` of them
in `WINDOW_STEPS` steps mean that the weights are to blame: the stage takes its weights from the
newest regular checkpoint of before the first of them and leaves out the steps since then, once.
The second time it stops.
"""

from ursa.config import FrozenModel

MAX_SKIPPED = 3
WINDOW_STEPS = 100


class SkippedSteps(FrozenModel):
    """Steps of a stage, counted from 0, that left no trace in the weights; in every checkpoint.

    Attributes:
        steps: Those whose loss or gradient was not finite.
        taken_back: First step of the window that was taken back, and the step after its last.
    """

    steps: tuple[int, ...] = ()
    taken_back: tuple[int, int] | None = None

    def with_step(self, step: int) -> "SkippedSteps":
        """Return a copy with one more skipped step.

        Args:
            step: Its number, above all the others.
        """
        return self.model_copy(update={"steps": (*self.steps, step)})

    def recent(self, count: int) -> tuple[int, ...]:
        """Return the skipped ones of the last `WINDOW_STEPS` steps, since a window was taken back.

        Args:
            count: Steps done.
        """
        begin = max(count - WINDOW_STEPS, self.taken_back[1] if self.taken_back else 0)
        return tuple(step for step in self.steps if step >= begin)

    def number(self) -> int:
        """Return how many steps left no trace."""
        begin, end = self.taken_back or (0, 0)
        return end - begin + sum(not begin <= step < end for step in self.steps)
