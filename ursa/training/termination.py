"""SIGTERM: noted, so that what is under way can be saved first."""

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

TERMINATED = 143
"""Exit status after SIGTERM."""


class Termination:
    """Notes a SIGTERM; the old handler is put back at the end.

    Processes that are given get it as well. In another thread than the main one, which alone can
    take signals, nothing is noted.
    """

    def __init__(self, forward_to: Sequence[int] = ()) -> None:
        """Prepare; the context begins to note.

        Args:
            forward_to: Ids of processes.
        """
        self.requested = False
        self._forward_to = forward_to
        self._previous: Any = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Termination":
        if self._active:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._previous)

    def end(self) -> NoReturn:
        """Do now what SIGTERM was to do: what the handler of before does, else exit.

        Raises:
            SystemExit: With status 143, if that handler returns, there is none, or it was another
                process that got SIGTERM.
        """
        if self.requested and callable(self._previous):
            self._previous(signal.SIGTERM, None)
        raise SystemExit(TERMINATED)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
        for process in self._forward_to:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
