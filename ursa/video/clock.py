"""When decoded frames are shown, from timestamps that may be missing, swapped or torn."""

from typing import NamedTuple

MAX_GAP_S = 10.0
"""A longer pause between two frames is a break of the clock, not a still picture."""
MAX_STEP_BACK_S = 1.0
"""A shorter step back is a badly written timestamp, a longer one a break of the clock."""


class Tick(NamedTuple):
    """The time of a frame, counted from the first one; `is_break` if the clock was torn there."""

    time_s: float
    is_break: bool


class FrameClock:
    """Gives frames in display order times that never fall.

    Presentation timestamps decide. Some muxers write them in coding order; when one steps back a
    little, decoding timestamps, which ascend, are used from there on. A frame without any
    timestamp follows the one before at the nominal distance.
    """

    def __init__(self, nominal_frame_s: float) -> None:
        """Start before the first frame.

        Args:
            nominal_frame_s: Distance of two frames where the file says nothing, seconds.
        """
        self._nominal_s = nominal_frame_s
        self._last_s: float | None = None
        self._pts_offset_s: float | None = None
        self._dts_offset_s: float | None = None
        self._uses_dts = False

    def advance(self, pts_s: float | None, dts_s: float | None) -> Tick:
        """Return when the next frame is shown.

        Args:
            pts_s: Its presentation timestamp, seconds, or None.
            dts_s: Its decoding timestamp, seconds, or None.
        """
        if self._last_s is None:
            tick = Tick(0.0, is_break=False)
        else:
            tick = self._next(self._last_s, pts_s, dts_s)
        self._last_s = tick.time_s
        if pts_s is not None and (self._pts_offset_s is None or tick.is_break):
            self._pts_offset_s = pts_s - tick.time_s
        if dts_s is not None and (self._dts_offset_s is None or tick.is_break):
            self._dts_offset_s = dts_s - tick.time_s
        return tick

    def _next(self, last_s: float, pts_s: float | None, dts_s: float | None) -> Tick:
        by_pts = _relative(pts_s, self._pts_offset_s)
        by_dts = _relative(dts_s, self._dts_offset_s)
        if by_pts is not None and by_dts is not None:
            self._uses_dts |= -MAX_STEP_BACK_S < by_pts - last_s <= 0
        time_s = by_dts if self._uses_dts or by_pts is None else by_pts
        if time_s is None:
            return Tick(last_s + self._nominal_s, is_break=False)
        if not -MAX_STEP_BACK_S < time_s - last_s <= MAX_GAP_S:
            return Tick(last_s + self._nominal_s, is_break=True)
        return Tick(max(time_s, last_s), is_break=False)


def _relative(timestamp_s: float | None, offset_s: float | None) -> float | None:
    if timestamp_s is None or offset_s is None:
        return None
    return timestamp_s - offset_s
