"""The time that a request has, if it ends without an answer: on AWS Lambda the process is ended or frozen then.

Running Python cannot be interrupted. A timer of the event loop fires late while another thread holds the interpreter
lock, and one step of C over some megabytes of JSON may hold it for longer than the timer has. So work is not begun if
it could take longer than the time that is left:

- T1 *Work is bounded before it begins.* `operations` counts at most how many steps a JSON text takes, from its bytes.
  The slowest work on JSON does more than OPERATIONS_PER_S of them on a whole CPU, and Lambda gives a share of one.
- T2 *What is refused changed nothing.* A write is checked while it is planned and once before it is committed, never
  after. So the answer is a failure for certain, and not an unknown outcome.
- T3 *Work in pieces is checked at each piece*: the operations of a batch, the pages of a list, each attempt of a write.
- T4 Without a deadline nothing is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

from ...errors import NotEnoughTime

OPERATIONS_PER_S = 800_000
"""Steps that the slowest work on JSON does in a second of one CPU at least. It was seen to do twice as many, and most
work five times (`python -m benchmarks.json_work`). With 512 MB and 29 s all that the limits allow is within the
time."""
STEP_BYTES = 16
"""Bytes of text that count as one step: texts are copied, hashed and searched, and escapes in them are undone."""
MOST_PARTS = 1_650_000
"""Steps of what stands between the texts, at most: `json_shape` lets no more in."""
CONTAINER_STEPS = 4
"""Steps of an object or list: they are made, walked over and hashed one by one."""


def operations(*texts: bytes) -> int:
    """Return at most how many steps one piece of work on these JSON texts takes."""
    return sum(len(text) // STEP_BYTES + min(_parts(text), MOST_PARTS) for text in texts)


def _parts(text: bytes) -> int:
    """Return at most how many values and names there are; too many where strings hold brackets and commas."""
    return text.count(b",") + text.count(b":") + CONTAINER_STEPS * (text.count(b"[") + text.count(b"{"))


class Deadline:
    """The end of the time that a request has.

    seconds  until then
    cpus     the share of a CPU that the process has, at most 1: one thread at a time runs Python
    """

    def __init__(self, seconds: float, cpus: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._whole, self._at = clock, seconds, clock() + seconds
        self._rate = OPERATIONS_PER_S * min(1.0, cpus)

    def affordable(self) -> int:
        """Return how many operations are certain to end in time."""
        return max(0, int((self._at - self._clock()) * self._rate))

    def check(self, count: int) -> None:
        """Raise NotEnoughTime unless so many operations are certain to end in time."""
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
    """Raise NotEnoughTime unless so many operations are certain to end within the time that the request has."""
    deadline = DEADLINE.get()
    if deadline is not None:
        deadline.check(count)
