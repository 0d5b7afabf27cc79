"""Imports that are cancelled while a thread works for them: with Ctrl-C, a time-out, or a client that has gone."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.backup.plain_stream import READ
from app.autocrud.resource_manager.runtime.threads import Stopped, until_cancelled

from .imports import Note, Place, fill, program


async def test_the_verification_stops_with_the_import(tmp_path):
    source, archive = program("memory", Place(tmp_path)), tmp_path / "a.tar.gz"
    for _ in range(30):
        await source.resource_manager(Note).create(Note(text=os.urandom(50_000).hex()))
    await export_all(source.managers, archive)
    assert archive.stat().st_size > 4 * READ
    begun, released, calls = threading.Event(), threading.Event(), []

    def progress(*told: object) -> None:
        calls.append(told)
        begun.set()
        released.wait(60)

    target = program("memory", Place(tmp_path))
    importing = asyncio.create_task(import_all(target.managers, archive, progress=progress))
    await asyncio.to_thread(begun.wait, 60)
    importing.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not importing.done(), "the thread reads the archive"
    released.set()
    with pytest.raises(asyncio.CancelledError):
        await importing
    assert len(calls) == 1, "the rest of the archive is not read"
    await fill(target.resource_manager(Note))


async def test_work_that_is_not_cancelled_returns_its_result_and_raises_its_errors():
    assert await until_cancelled(lambda check: check() or 1) == 1

    def fail(_: object) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        await until_cancelled(fail)


async def test_work_that_is_cancelled_is_waited_for():
    begun, ended = threading.Event(), threading.Event()

    def work(check) -> None:
        begun.set()
        try:
            while True:
                check()
        except Stopped:
            ended.set()
            raise

    working = asyncio.create_task(until_cancelled(work))
    await asyncio.to_thread(begun.wait, 60)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended.is_set()
