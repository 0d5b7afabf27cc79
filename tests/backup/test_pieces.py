"""The threads that read an archive ahead of an import."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from app.autocrud.backup.pieces import prefetched


async def test_a_reader_that_is_cancelled_ends_after_its_thread():
    begun, released, ended = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        begun.set()
        released.wait(60)
        ended.set()
        yield 1

    async def read() -> None:
        async with aclosing(prefetched(items())) as prepared:
            async for _ in prepared:
                pass

    reading = asyncio.create_task(read())
    await asyncio.to_thread(begun.wait, 60)
    reading.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done(), "the thread uses the archive, which is closed next"
    released.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended.is_set()


async def test_an_item_that_is_not_used_may_fail(caplog):
    failed = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        failed.set()
        raise ValueError

    async with aclosing(prefetched(items())) as prepared:
        assert await anext(prepared) == 1
        await asyncio.to_thread(failed.wait, 60)
    await asyncio.sleep(0)
    assert caplog.text == ""
