"""Pins: they are dropped when they are not renewed, and their holders notice."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import apsw
import psycopg
import pytest

from app.autocrud.errors import CrudError, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    LOST_ANSWER,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.contract.snapshots import Pinning
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore


class Store(Pinning, Protocol):
    async def close(self) -> None: ...


KINDS = {
    "memory": lambda _: MemoryMetaStore(),
    "disk": DiskMetaStore,
    "s3": lambda _: S3SqliteMetaStore("b", "k", object_store=MemoryObjectStore()),
}
SERVERS: dict[str, Callable[[str, str, str], Store]] = {
    "postgres": lambda name, dsn, _: PostgresMetaStore(dsn, table_name=name),
    "redis": lambda name, _, url: RedisMetaStore(url, prefix=f"{name}:"),
    "fast-slow": lambda name, dsn, url: FastSlowMetaStore(
        RedisMetaStore(url, prefix=f"{name}:"), PostgresMetaStore(dsn, table_name=name)
    ),
}


def on_servers(kind: str, request: pytest.FixtureRequest, name: str) -> Store:
    dsn, url = request.getfixturevalue("postgres"), request.getfixturevalue("valkey")
    return SERVERS[kind](name, dsn, url)


@pytest.fixture(params=[*KINDS, *SERVERS])
async def store(request, tmp_path: Path) -> AsyncIterator[Store]:
    kind = request.param
    store: Store = KINDS[kind](tmp_path) if kind in KINDS else on_servers(kind, request, f"pins_{uuid4().hex}")
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


@pytest.mark.parametrize("kind", ["disk", *SERVERS])
async def test_processes_see_the_pins_of_each_other(kind: str, request, tmp_path: Path):
    name = f"pins_{uuid4().hex}"
    one, other = (
        DiskMetaStore(tmp_path) if kind == "disk" else on_servers(kind, request, name) for _ in ("one", "other")
    )
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


HOLDER = """
import asyncio, sys
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore

async def hold(kind, address, name):
    store = PostgresMetaStore(address, table_name=name) if kind == "postgres" else RedisMetaStore(address, name + ":")
    await store.add_pin("a")
    while await store.renew_pin("a"):
        print("renewed", flush=True)
        await asyncio.sleep(0.05)

asyncio.run(hold(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "redis"])
async def test_the_pin_of_a_killed_process_is_dropped(kind: str, request, monkeypatch):
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 2.0)
    address, name = request.getfixturevalue("valkey" if kind == "redis" else kind), f"pins_{uuid4().hex}"
    store = on_servers(kind, request, name)
    command = [sys.executable, "-c", HOLDER, kind, address, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        for _ in range(60):  # for longer than the life of a pin that is not renewed
            assert await asyncio.to_thread(holder.stdout.readline) == "renewed\n"
        assert await store.has_pins()
        holder.kill()
    assert await store.has_pins()
    await asyncio.sleep(2.1)
    assert not await store.has_pins()
    assert not await store.renew_pin("a")
    await store.close()


@pytest.mark.parametrize("kind", ["postgres", "redis"])
async def test_a_pin_of_a_server_whose_clock_was_put_back_is_dropped(kind: str, request):
    name = f"pins_{uuid4().hex}"
    store: Any = on_servers(kind, request, name)
    await store.add_pin("a")
    if kind == "postgres":
        await store._changed("UPDATE <pins> SET time = now() + interval '1 day'")
    else:
        await store._call("HSET", f"{name}:pins", "a", time.time() + 24 * 3600)
    assert not await store.renew_pin("a")
    assert not await store.has_pins()
    await store.close()


async def test_a_renewal_in_progress_keeps_a_pin(postgres: str):
    """A pin lapses while its renewal is committed: whether there is a pin is answered after the renewal."""
    store = PostgresMetaStore(postgres, table_name=f"pins_{uuid4().hex}")
    await store.add_pin("a")
    await store._changed("UPDATE <pins> SET time = now() - interval '1 hour'")
    async with await psycopg.AsyncConnection.connect(postgres) as connection:
        await connection.execute(store._filled("UPDATE <pins> SET time = now()"))
        asking = asyncio.create_task(store.has_pins())
        await asyncio.sleep(0.3)
        assert not asking.done()
        await connection.commit()
        assert await asking
    await store.close()


async def test_a_memory_store_that_is_bound_again_has_no_pins():
    store = MemoryMetaStore()
    await store.add_pin("a")
    store.bind(store._tables.spec)
    assert not await store.has_pins()
    assert not await store.remove_pin("a")


# On S3


class Fleet:
    """Instances that share a bucket."""

    def __init__(self) -> None:
        self.objects = MemoryObjectStore()
        self.instances: list[S3SqliteMetaStore] = []

    def instance(self) -> S3SqliteMetaStore:
        self.instances.append(S3SqliteMetaStore("b", "k", object_store=self.objects, sync_interval=None))
        return self.instances[-1]

    def pass_time(self, seconds: float) -> None:
        """Let the clock of S3 advance. Those of the instances do not."""
        clock = self.objects.clock
        self.objects.clock = lambda: clock() + dt.timedelta(seconds=seconds)

    def markers(self) -> list[str]:
        return [key for key in self.objects.objects if key.startswith("k/pin/")]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    for instance in fleet.instances:
        await instance.close()


async def test_instances_see_the_pins_that_were_added_before_their_last_lookup(fleet: Fleet):
    one, other = fleet.instance(), fleet.instance()
    await other.refresh()
    await one.add_pin("a")
    await other.unreferenced(["0/x"])  # a sweep looks for references, then asks
    assert await other.has_pins()
    assert await one.remove_pin("a")
    await other.unreferenced(["0/x"])
    assert not await other.has_pins()
    assert not fleet.markers()


async def test_only_the_clock_of_s3_decides_when_a_pin_is_dropped(fleet: Fleet):
    one, other = fleet.instance(), fleet.instance()
    await one.add_pin("a")
    fleet.pass_time(snapshots.PIN_LIFE_S - 1)
    assert await one.renew_pin("a")
    fleet.pass_time(snapshots.PIN_LIFE_S - 1)
    assert await other.has_pins()
    fleet.pass_time(2)
    other._pins._looked_at = float("-inf")
    assert not await other.has_pins()
    assert not await one.renew_pin("a")
    assert not await one.remove_pin("a")
    assert not fleet.markers()


async def test_a_pin_whose_marker_is_missing_is_dropped(fleet: Fleet):
    one, other = fleet.instance(), fleet.instance()
    await one.add_pin("a")
    await fleet.objects.delete(fleet.markers())
    await other.refresh()
    assert not await other.has_pins()
    assert not await one.remove_pin("a")


async def test_markers_without_a_pin_are_deleted(fleet: Fleet):
    one = fleet.instance()
    await one.refresh()
    await fleet.objects.put("k/pin/killed before HEAD named it", b"")
    fleet.pass_time(snapshots.PIN_LIFE_S)
    await one.add_pin("a")
    assert await one.renew_pin("a")
    assert fleet.markers() == ["k/pin/a"]
    await fleet.objects.put("k/pin/killed", b"")
    fleet.objects.modified["k/pin/killed"] -= dt.timedelta(days=3)
    fleet.objects.modified["k/pin/a"] -= dt.timedelta(days=3)  # this one is named by HEAD: the clock here may be wrong
    await one.maintain(10)
    assert fleet.markers() == ["k/pin/a"]


@pytest.mark.parametrize("op", ["put", "put_if", "list", "delete", "get_if"])
@pytest.mark.parametrize("fault", [DROPPED, LOST_ANSWER])
async def test_a_pin_that_was_acknowledged_is_kept_whatever_fails_once(fleet: Fleet, op: str, fault: InjectedFault):
    """Each step fails once. The pin is either refused with an error, or it lasts until it is removed."""
    one, other = fleet.instance(), fleet.instance()
    await one.refresh()

    async def failing_once(work):
        calls = itertools.count()
        fleet.objects.fault = lambda call: fault if call.op == op and not next(calls) else None
        try:
            return await work
        finally:
            fleet.objects.fault = lambda _: None

    try:
        await failing_once(one.add_pin("a"))
    except CrudError:
        assert op in ("put", "get_if")
        return
    for work in (one.renew_pin, one.remove_pin):
        await other.refresh()
        assert await other.has_pins()
        with contextlib.suppress(StoreUnavailable):
            assert await failing_once(work("a"))
    await other.refresh()
    if await other.has_pins():
        assert await one.remove_pin("a")
        await other.refresh()
    assert not await other.has_pins()
