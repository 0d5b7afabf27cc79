"""Ages that are correct after a machine was frozen or restored from a snapshot, or after its clock was set."""

from __future__ import annotations

import time
from typing import NamedTuple

_running = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Moment(NamedTuple):
    """A moment on two clocks, in seconds.

    running  the time since the machine was started, including the time in which it slept
    wall     the time since 1970. It is right after a snapshot of the machine is restored, when `running` is not.
    """

    running: float
    wall: float

    @classmethod
    def now(cls) -> Moment:
        """Return the present moment."""
        return cls(time.clock_gettime(_running), time.time())

    def age(self) -> float:
        """Return the seconds since this moment. The result may be too large if the clock was set, never too small."""
        return Moment.now().after(self)

    def after(self, earlier: Moment) -> float:
        """Return the seconds from an earlier moment to this one."""
        return max(self.running - earlier.running, abs(self.wall - earlier.wall))
