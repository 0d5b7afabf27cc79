"""Ages that hold although a machine is frozen, restored from a snapshot, or has its clock set."""

from __future__ import annotations

import time
from typing import NamedTuple

_running = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Moment(NamedTuple):
    """A moment on two clocks, in seconds.

    `running` goes on while the machine sleeps. `wall` is set when a snapshot of the machine is restored.
    """

    running: float
    wall: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.clock_gettime(_running), time.time())

    def age(self) -> float:
        """Return the seconds since then, or more: a clock that was set makes it older, never younger."""
        return Moment.now().after(self)

    def after(self, earlier: Moment) -> float:
        """Return the age of an earlier moment at this one."""
        return max(self.running - earlier.running, abs(self.wall - earlier.wall))
