"""The deadline of a request. On AWS Lambda the process is stopped or frozen when the time of a request is over.

Running Python code cannot be interrupted. A timer of the event loop fires late while another thread holds the
interpreter lock, and a single step in C over some megabytes of JSON may hold it for longer than the time that is left.
So work does not begin if it could take longer than that:

- T1 *Work is bounded before it begins.* `operations` computes from the bytes of a JSON text how many steps the work on
  it takes at most. Even the slowest work on JSON does more than OPERATIONS_PER_S steps in a second of a whole CPU. A
  function on Lambda may have only a share of a CPU.
- T2 *A refused request has changed nothing.* A write is checked while it is planned and once before it is committed,
  never after. So its error means that nothing was changed, and never that the outcome is unknown.
- T3 *Work in pieces is checked at each piece*: the operations of a batch, the pages of a list, the attempts of a write.
- T4 *Without a deadline nothing is refused.*
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

from ...errors import NotEnoughTime

OPERATIONS_PER_S = 800_000
"""Steps that the slowest work on JSON does at least in a second of one CPU. Measured: twice as many for the slowest
work, five times as many for most work (`python -m benchmarks.json_work`). A function with 512 MB and 29 s has time for
every request that the limits allow."""
STEP_BYTES = 16
"""Bytes of text that count as one step: texts are copied, hashed, searched and unescaped."""
MOST_PARTS = 1_650_000
"""Upper bound of the steps for values, names and containers. `json_shape` refuses texts with more."""
CONTAINER_STEPS = 4
"""Steps for an object or list, which is created, visited and hashed."""


def operations(*texts: bytes) -> int:
    """Return how many steps one piece of work on these JSON texts takes at most."""
    return sum(len(text) // STEP_BYTES + min(_parts(text), MOST_PARTS) for text in texts)


def _parts(text: bytes) -> int:
    """Return an upper bound of the steps for values and names. Commas, colons and brackets in strings count too."""
    return text.count(b",") + text.count(b":") + CONTAINER_STEPS * (text.count(b"[") + text.count(b"{"))


class Deadline:
    """The time when a request must be answered.

    seconds  from now until then
    cpus     CPUs of the process; more than 1 count as 1, because one thread at a time runs Python
    clock    returns the present time in seconds
    """

    def __init__(self, seconds: float, cpus: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._whole, self._at = clock, seconds, clock() + seconds
        self._rate = OPERATIONS_PER_S * min(1.0, cpus)

    def affordable(self) -> int:
        """Return how many steps are certain to end in time."""
        return max(0, int((self._at - self._clock()) * self._rate))

    def check(self, count: int) -> None:
        """Raise NotEnoughTime unless `count` steps are certain to end in time."""
        left, needed = self._at - self._clock(), count / self._rate
        if left > 0 and needed <= left:
            return
        error = NotEnoughTime(
            f"the work on this may take {needed:.1f} s, and {max(0.0, left):.1f} s are left for it; it was not done: "
            + (
                "try again"
                if needed <= self._whole
                else "send or ask for less at once, or give the function more memory or time"
            )
        )
        error.may_fit = needed <= self._whole
        raise error


DEADLINE: ContextVar[Deadline | None] = ContextVar("crudstack.deadline", default=None)
"""The deadline of the request that is being answered, if it has one."""


def check_time(count: int = 0) -> None:
    """Raise NotEnoughTime unless `count` steps are certain to end before the deadline of the request, if it has one."""
    deadline = DEADLINE.get()
    if deadline is not None:
        deadline.check(count)
