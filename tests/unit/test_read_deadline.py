"""The deadline of a client that reads a response: steady readers of long downloads keep their connections."""

from __future__ import annotations

import pytest

from app.server.http_answers import WRITE_S, ReadDeadline
from app.server.request_body import BODY_S, MIN_RATE, UPLOAD_PAUSE_S, RequestBody

BUFFER = 128 * 1024


def seconds_until_missed(rate: float, *, limit: float = 3600.0) -> float | None:
    """Read `rate` bytes a second of a response whose buffer is filled again at once. Return when it is missed."""
    deadline, read, moved, before = ReadDeadline(), 0.0, 0.0, -1
    now = 0.0
    while now < limit:
        deadline.written = int(read) + BUFFER
        if int(read) != before:
            before, moved = int(read), now
        if deadline.is_missed(now, BUFFER, now - moved):
            return now
        now += 1.0
        read += rate
    return None


@pytest.mark.parametrize("rate", [MIN_RATE * 1.1, 100_000, 10_000_000])
def test_a_reader_that_is_fast_enough_may_take_hours(rate):
    assert seconds_until_missed(rate) is None


@pytest.mark.parametrize("rate", [0, 1, MIN_RATE / 4])
def test_a_reader_that_is_too_slow_is_given_up_soon(rate):
    missed = seconds_until_missed(rate)
    assert missed is not None
    assert WRITE_S < missed < 2 * WRITE_S


def test_time_without_unsent_bytes_does_not_count():
    deadline = ReadDeadline()
    deadline.written = 10
    assert not deadline.is_missed(0.0, 10, 0.0)
    deadline.restart()
    assert not deadline.is_missed(1000.0, 10, 0.0)
    assert deadline.is_missed(1000.0 + WRITE_S + 1, 10, 0.0)


def test_an_upload_may_pause_for_longer_than_another_body():
    for streamed, pause in ((False, BODY_S), (True, UPLOAD_PAUSE_S)):
        body = RequestBody(10**9)
        body.streamed = streamed
        body.arrived(10**6)
        assert body.lateness(pause - 1, pause - 1) is None
        assert body.lateness(100.0, pause) is None
        assert body.lateness(100.0, pause + 1) is not None
        assert body.lateness(pause + 10**6 / MIN_RATE + 1, 0.0) is not None
