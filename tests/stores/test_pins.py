"""Pins: they are dropped when they are not renewed, and their holders notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import apsw
import pytest

from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.contract.snapshots import Pinning
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore


class Store(Pinning, Protocol):
    async def close(self) -> None: ...


@pytest.fixture(params=["memory", "disk"])
async def store(request, tmp_path: Path) -> AsyncIterator[Store]:
    store: Store = MemoryMetaStore() if request.param == "memory" else DiskMetaStore(tmp_path)
    yield store
    await store.close()


async def test_a_store_has_pins_until_the_last_one_is_removed(store: Store):
    assert not await store.has_pins()
    await store.add_pin("a")
    await store.add_pin("b")
    assert await store.remove_pin("a")
    assert await store.has_pins()
    assert await store.renew_pin("b")
    assert await store.remove_pin("b")
    assert not await store.has_pins()


async def test_removed_and_unknown_pins_are_reported(store: Store):
    assert not await store.renew_pin("never added")
    assert not await store.remove_pin("never added")
    await store.add_pin("a")
    assert await store.remove_pin("a")
    assert not await store.remove_pin("a")
    assert not await store.renew_pin("a")


async def test_pins_that_are_not_renewed_are_dropped_and_their_holders_notice(store: Store, monkeypatch):
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 1.5)
    await store.add_pin("lost")
    await store.add_pin("kept")
    for _ in range(4):
        await asyncio.sleep(0.5)
        assert await store.renew_pin("kept")
    assert not await store.renew_pin("lost")
    assert not await store.remove_pin("lost")
    assert await store.has_pins()
    await asyncio.sleep(1.6)
    assert not await store.has_pins()
    assert not await store.remove_pin("kept")


async def test_a_dropped_pin_stays_dropped(store: Store, monkeypatch):
    """Once `has_pins` returned False, bodies may be removed, so the pin must not come back."""
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 0.05)
    await store.add_pin("a")
    await asyncio.sleep(0.1)
    assert not await store.has_pins()
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 600.0)
    assert not await store.renew_pin("a")


async def test_processes_see_the_pins_of_each_other(tmp_path: Path):
    one, other = DiskMetaStore(tmp_path), DiskMetaStore(tmp_path)
    await one.add_pin("a")
    assert await other.has_pins()
    assert await other.renew_pin("a")
    assert await one.remove_pin("a")
    assert not await other.has_pins()
    await one.close()
    await other.close()


async def test_a_pin_of_a_clock_that_was_put_back_is_dropped(tmp_path: Path):
    store = DiskMetaStore(tmp_path)
    await store.add_pin("a")
    connection = apsw.Connection(str(tmp_path / "index.sqlite"))
    connection.execute("UPDATE pins SET time = ?", (time.time() + 24 * 3600,))
    connection.close()
    assert not await store.has_pins()
    assert not await store.renew_pin("a")
    await store.close()


async def test_a_memory_store_that_is_bound_again_has_no_pins():
    store = MemoryMetaStore()
    await store.add_pin("a")
    store.bind(store._tables.spec)
    assert not await store.has_pins()
    assert not await store.remove_pin("a")
