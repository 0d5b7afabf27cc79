"""A lock among processes. One that is killed holds none."""

from __future__ import annotations

import fcntl
import time


def lock_within(seconds: float, handle: int, look_every_s: float) -> None:
    """Take the lock of an open file; BlockingIOError if somebody has it for so long, who may have been stopped."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(look_every_s)
