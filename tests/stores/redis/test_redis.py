"""RedisMetaStore: the conformance suite, versions of the program, and rules of its own."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path
from typing import ClassVar

import pytest
from msgspec.structs import replace

from app.autocrud import Encoding
from app.autocrud.errors import (
    ConfigError,
    UniqueConflict,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.redis import scripts
from app.autocrud.resource_manager.basic import KEEP_KEYS_US
from app.autocrud.resource_manager.engine.operations import Update
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing import SharedConformance
from app.autocrud.testing.model import Clock
from tests.stores.redis.helpers import Note, RedisAndDisk, _create, _update, key, keyed, meta_store


@pytest.mark.usefixtures("valkey")
class TestRedis(SharedConformance):
    durable: ClassVar[bool] = False

    def make(self, root: Path) -> IStorageFactory:
        return RedisAndDisk(root)


@pytest.mark.usefixtures("valkey")
class TestRedisAsMessagePack(SharedConformance):
    durable: ClassVar[bool] = False

    def make(self, root: Path) -> IStorageFactory:
        return RedisAndDisk(root, Encoding.msgpack)


# Versions of the program


async def test_versions_with_other_fields_share_one_store(instance):
    old, new = instance(fields=("text",)), instance(fields=("text", "code"))
    await old.create(Note("from old", "a"))
    await new.open()
    await new.create(Note("from new", "b"))
    for manager in (old, new):
        assert await manager.count(Query(where=field("text").starts_with("from"))) == 2
    assert await new.count(Query(where=field("code").in_(["a", "b"]))) == 2
    later = await old.create(Note("later", "c"))
    await old.update(later.meta.resource_id, Note("later still", "d"))
    outdated = await meta_store(new).outdated(10)
    assert [meta.resource_id for meta in outdated] == [later.meta.resource_id]
    again = instance(fields=("text", "code"))
    assert await again.count(Query(where=field("code").eq("d"))) == 1
    assert await again.count(Query(where=field("code").eq("c"))) == 0
    assert await new.count(Query(where=field("code").eq("d"))) == 1  # indexed for all
    assert await meta_store(new).outdated(10) == []


async def test_a_unique_field_binds_earlier_versions_too(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"), resource_id="0")
    new = instance()
    await new.create(Note("1", "b"))
    with pytest.raises(UniqueConflict):
        await new.create(Note("x", "a"))
    with pytest.raises(UniqueConflict):
        await old.create(Note("2", "b"))
    await old.update("0", Note("0", "c"))
    await new.create(Note("2", "a"))
    with pytest.raises(UniqueConflict):
        await new.create(Note("3", "c"))
    with pytest.raises(ConfigError, match="unique"):
        await instance(fields=("text",)).create(Note("3", "z"))


async def test_a_field_cannot_become_unique_over_duplicates(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"))
    second = await old.create(Note("1", "a"))
    with pytest.raises(ConfigError, match=r"code .*share a value"):
        await instance().create(Note("2", "b"))
    await old.create(Note("3", "a"))  # nothing has become of it
    await old.purge(second.meta.resource_id)
    with pytest.raises(ConfigError, match="share a value"):
        await instance().create(Note("2", "b"))


async def test_a_field_becomes_unique_while_others_write(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"))
    new = meta_store(instance())
    run, written = new._run, []

    async def slow(script, *arguments):
        if script is scripts.ADOPT and not written:
            written.append(await old.create(Note("1", "b")))
        return await run(script, *arguments)

    new._run = slow
    await new.commit([_create("r")])
    assert written
    for code in ("a", "b"):
        with pytest.raises(UniqueConflict):
            await old.create(Note("2", code))


# What only this store must take care of


async def test_an_id_is_never_the_key_of_another_resource(valkey, tmp_path):
    """Prefixes that look like another store's keys, and ids that look like its prefix."""
    prefixes = [f"{tmp_path.name}:", f"{tmp_path.name}:res:", f"{tmp_path.name}:res:a", f"{tmp_path.name}:m", "", "me"]
    stores = [RedisMetaStore(valkey, prefix=prefix) for prefix in prefixes]
    ids = ["meta", "res:meta", "a", "ameta", "log", "x" * 100_000, "\n", "1:a", "k0:", "*", "😀", "ids"]
    for at, store in enumerate(stores):
        await store.commit([_create(rid) for rid in ids[at:]])
    for at, store in enumerate(stores):
        assert [meta.resource_id async for meta in store.scan()] == sorted(ids[at:])
        states = [meta async for meta in store.scan()]
        await store.commit([replace(_update(meta), purge=True) for meta in states])
        assert await store.count(Query(include_deleted=True).resolve({})) == 0
        await store.close()


async def test_a_body_that_was_replaced_takes_no_record_along(instance):
    manager = instance()
    created = await manager.create(Note("1"), status="draft")
    rid, store = created.meta.resource_id, meta_store(manager)
    record = await store.revision(rid, 1)
    changed = replace(_update(created.meta), record=replace(record, uid="0/other"))
    (meta,) = await store.commit([changed])
    await store.commit([replace(_update(meta), drop=(record.uid,))])
    assert (await store.revision(rid, 1)).uid == "0/other"
    assert await store.unreferenced([record.uid, "0/other"]) == [record.uid]


async def test_histories_with_holes_have_pages(instance):
    manager = instance()
    created = await manager.create(Note("1"))
    rid = created.meta.resource_id
    await manager.batch([Update(resource_id=rid, data=Note(f"{number}")) for number in range(2, 41)])
    infos = (await manager.revisions(rid, limit=100)).items
    assert [info.revision for info in infos] == list(range(40, 0, -1))
    meta = (await manager.get(rid)).meta
    gone = tuple(info.uid for info in infos if info.revision not in (40, 39, 20, 3, 2))
    await meta_store(manager).commit([replace(_update(meta), drop=gone)])
    seen, before = [], None
    while True:
        page = await meta_store(manager).revisions(rid, before, 2)
        seen.append([info.revision for info in page.items])
        if (before := page.next) is None:
            break
    assert seen == [[40, 39], [20, 3], [2]]
    assert (await meta_store(manager).revisions(rid, -5)).items == []
    assert (await meta_store(manager).revisions(rid, 10**30)).items[0].revision == 40


async def test_keys_are_forgotten_after_a_day_and_leave_nothing(instance, server):
    clock = Clock()
    manager = instance(clock=clock)
    created = await manager.create(Note("1"), by=keyed("old"))
    await manager.update(created.meta.resource_id, Note("2"), by=keyed("old too"))
    assert server.zcard(key(manager, "keytimes")) == 2
    clock.now += dt.timedelta(microseconds=KEEP_KEYS_US + 1000)
    await manager.create(Note("3"), by=keyed("new"))
    assert server.zcard(key(manager, "keytimes")) == 1
    assert server.hlen(key(manager, "done")) == 2
    fields = [name for res in server.keys(key(manager, "res:*")) for name in server.hkeys(res)]
    assert len([name for name in fields if name.startswith(b"k")]) == 1
    await manager.create(Note("1"), by=keyed("old"))
    assert await manager.count() == 3


async def test_a_url_may_say_what_the_driver_understands(instance, valkey):
    manager = instance(url=f"{valkey}?decode_responses=true&protocol=3&max_connections=1&socket_timeout=5")
    await asyncio.gather(*(manager.create(Note(f"{number}")) for number in range(20)))
    assert await manager.count() == 20


def test_a_url_that_cannot_be_read_is_not_repeated():
    for url in (
        "redis://:pa/secret@host",
        "http://:secret@host",
        "redis://:secret@host:port",
        "redis://h?nothing=secret",
        "redis://h/secret",
        "rediss://h/1/2",
    ):
        with pytest.raises(ConfigError, match="redis_url") as caught:
            RedisMetaStore(url)
        assert "secret" not in str(caught.value)


async def test_a_password_is_made_for_each_connection_and_may_change(valkey, server, tmp_path):
    made = []

    def password() -> str:
        made.append(f"token-{len(made)}")
        server.acl_setuser("app", reset=True, enabled=True, passwords=[f"+{made[-1]}"], keys="*", categories=["+@all"])
        return made[-1]

    url = valkey.replace(valkey[valkey.index("://") + 3 : valkey.index("@")], "app:ignored")
    store = RedisMetaStore(url, prefix=f"{tmp_path.name}:", password=password)
    await store.health()
    await store.health()
    assert made == ["token-0"]  # an open connection outlives its token
    server.client_kill_filter(user="app")
    await store.health()
    assert len(made) == 2
    await store.close()
    server.acl_deluser("app")
