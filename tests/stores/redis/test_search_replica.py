"""RedisMetaStore: the replica that searches read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Iterator

import pytest

from app.autocrud.errors import (
    AnswerGone,
    StoreDamaged,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.redis import read_scripts, search_replica
from app.autocrud.resource_manager.backends.redis.script_parts import Script
from app.autocrud.resource_manager.engine.operations import Create, Delete, Purge, Retention, Switch, Update
from app.autocrud.resource_manager.meta_store import redis_access
from tests.stores.redis.helpers import Note, key, keyed, meta_store, texts

# The copy that searches read


async def test_a_store_that_was_flushed_is_an_empty_one(instance, server):
    first, second = instance(), instance()
    await first.create(Note("1", "a"), resource_id="r")
    assert await second.count() == 1
    server.flushall()
    for manager in (first, second):
        assert await texts(manager) == []
        assert await manager.count() == 0
    await second.create(Note("2", "a"), resource_id="r")
    assert await texts(first) == ["2"]
    server.flushall()
    await first.create(Note("3", "a"), resource_id="r")
    await first.update("r", Note("4", "b"))
    assert await texts(second) == await texts(first) == ["4"]


async def test_a_replica_behind_the_log_reads_all_data_again(instance, monkeypatch):
    monkeypatch.setattr(redis_access, "LOG_ENTRIES", 5)
    awake, asleep = instance(), instance()
    for number in range(4):
        await awake.create(Note(f"{number}", f"{number}"), resource_id=f"{number}")
    assert await texts(asleep) == ["0", "1", "2", "3"]
    await awake.update("0", Note("0 again", "0"))
    assert await texts(asleep) == ["0 again", "1", "2", "3"]
    for round_ in range(4):
        await awake.update("1", Note(f"1 {round_}", "x"))
        await awake.create(Note(f"new {round_}"))
    await awake.delete("2")
    await awake.purge("3")
    assert await texts(asleep) == await texts(awake) == ["0 again", "1 3", "new 0", "new 1", "new 2", "new 3"]
    assert [meta.resource_id async for meta in meta_store(asleep).scan()] == [
        meta.resource_id async for meta in meta_store(awake).scan()
    ]
    uids = [(await awake.get("1", revision=number)).info.uid for number in range(1, 6)]
    assert await meta_store(asleep).unreferenced([*uids, "0/nothing"]) == ["0/nothing"]


async def test_the_log_is_bounded_by_bytes_too(instance, server, monkeypatch):
    monkeypatch.setattr(redis_access, "LOG_BYTES", 4000)
    manager, other = instance(), instance()
    for number in range(20):
        await manager.create(Note(f"{number:02}"))
        assert await other.count() == number + 1
    entries = server.lrange(key(manager, "log"), 0, -1)
    assert sum(map(len, entries)) == int(server.hget(key(manager, "meta"), "bytes")) <= 4000
    await manager.batch([Create(Note(f"{number}")) for number in range(100)])
    assert server.llen(key(manager, "log")) == 0
    assert await other.count() == 120


@pytest.fixture
def paged(server, monkeypatch) -> Iterator[None]:
    """Copies are built from pages of a few resources: the server gives smaller sets than it is told as one."""
    monkeypatch.setattr(search_replica, "PAGE_SIZE", 3)
    name = "set-max-listpack-entries"
    usual = server.config_get(name)
    if usual:  # before Redis 7.2 none is so small
        server.config_set(name, 0)
    yield
    if usual:
        server.config_set(name, usual[name])


def scripts_run(manager, after: Script | None = None, do=None) -> list[Script]:
    """Return a list of the scripts that its replica runs from now on. Runs `do` after the script `after`."""
    copy_of, ran = meta_store(manager)._replica, []
    run = copy_of._run

    async def counted(script, *arguments):
        ran.append(script)
        answer = await run(script, *arguments)
        if script is after:
            await do()
        return answer

    copy_of._run = counted
    return ran


def rows(db):
    """All that a copy tells."""
    tables = ("resources ORDER BY id", "revisions JOIN resources USING (rid) ORDER BY id, revisions.revision")
    columns = (
        "id, version, nonce, doc, shown, missing, `f:text`, `f:code`",
        "id, revisions.revision, revisions.uid, revisions.doc",
    )
    return [db.execute(f"SELECT {what} FROM {table}").fetchall() for what, table in zip(columns, tables, strict=True)]


async def as_one_that_is_built_now(instance, manager) -> bool:
    return await meta_store(manager)._replica.read(rows) == await meta_store(instance())._replica.read(rows)


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("at_once", [1, 1000])
async def test_copies_are_right_whatever_happens_meanwhile(instance, monkeypatch, at_once):
    """Copies that are updated, or built during writes, equal a copy that is built afterwards."""
    monkeypatch.setattr(redis_access, "LOG_ENTRIES", 30)
    monkeypatch.setattr(search_replica, "AT_ONCE", at_once)
    managers = [instance(retention=Retention(last=3)) for _ in range(4)]
    for number in range(20):
        await managers[0].create(Note(f"{number}"), resource_id=f"{number}")
    rng = random.Random(1)

    async def write(manager, number) -> None:
        rid = f"{rng.randrange(20)}"
        operations = {
            "update": [Update(resource_id=rid, data=Note(f"{number}"))],
            "again": [Purge(resource_id=rid), Create(Note(f"again {number}"), rid)],
            "delete": [Delete(resource_id=rid), Purge(resource_id=rid), Create(Note(f"{number}"), rid)],
            "switch": [Update(resource_id=rid, data=Note(f"{number}")), Switch(resource_id=rid, revision=1)],
        }
        with contextlib.suppress(LookupError):
            await manager.batch(operations[rng.choice(sorted(operations))])

    async def read(manager) -> None:
        if rng.random() < 0.3:
            meta_store(manager)._replica.drop()
        assert await manager.count() == 20

    for number in range(40):
        await asyncio.gather(
            *(write(manager, number) for manager in managers), *(read(manager) for manager in managers)
        )

    expected = await meta_store(instance())._replica.read(rows)
    assert len(expected[0]) == 20
    for manager in managers:
        assert await meta_store(manager)._replica.read(rows) == expected
        for rid, revision, *_ in expected[1]:
            assert (await manager.get(rid, revision=revision)).info.revision == revision


async def test_copies_follow_over_purges(instance):
    """They need not read everything again."""
    manager, other = instance(), instance()
    for number in range(5):
        await manager.create(Note(f"{number}", f"{number}"), resource_id=f"{number}")
    assert await other.count() == 5
    ran = scripts_run(other)
    await manager.purge("0")
    assert await texts(other) == ["1", "2", "3", "4"]
    # Its value goes to another one, its id to one of fewer revisions.
    await manager.update("1", Note("1", "0"))
    await manager.update("2", Note("2", "x"))
    await manager.update("2", Note("2", "y"))
    await manager.batch(
        [Update(resource_id="2", data=Note("gone")), Purge(resource_id="2"), Create(Note("2", "2"), "2")]
    )
    await manager.batch(
        [Create(Note("5", "1"), "5"), Purge(resource_id="5"), Purge(resource_id="3"), Create(Note("6", "3"), "6")]
    )
    assert await texts(other) == ["1", "2", "4", "6"]
    assert await texts(other, Query(where=field("code").in_(["0", "2", "3"]))) == ["1", "2", "6"]
    assert set(ran) == {read_scripts.FOLLOW}
    assert await as_one_that_is_built_now(instance, other)


@pytest.mark.usefixtures("paged")
async def test_a_copy_is_built_although_more_is_written_meanwhile_than_the_log_keeps(instance, monkeypatch):
    monkeypatch.setattr(redis_access, "LOG_ENTRIES", 8)
    manager, other = instance(retention=Retention(last=2)), instance()
    await manager.batch([Create(Note(f"{number}"), f"{number}") for number in range(40)])
    rng = random.Random(2)

    async def write() -> None:
        for _ in range(2):
            rid = f"{rng.randrange(40)}"
            await manager.batch([Purge(resource_id=rid), Create(Note("again"), rid)])
            await manager.update(rid, Note("and again"))
            await manager.update(f"{rng.randrange(40)}", Note(os.urandom(4).hex()))

    ran = scripts_run(other, read_scripts.PAGE, write)
    assert await other.count() == 40
    assert 4 < ran.count(read_scripts.PAGE) < 24  # once
    assert await as_one_that_is_built_now(instance, other)


async def test_a_read_ends_however_much_is_written(instance, monkeypatch):
    monkeypatch.setattr(search_replica, "AT_ONCE", 2)
    manager, other = instance(), instance()
    await manager.create(Note("0"), resource_id="r")
    assert await other.count() == 1
    for number in range(10):
        await manager.create(Note(f"{number}"))

    async def write() -> None:
        for _ in range(3):
            await manager.update("r", Note(os.urandom(4).hex()))

    ran = scripts_run(other, read_scripts.FOLLOW, write)
    assert await other.count() == 11
    assert set(ran) == {read_scripts.FOLLOW}
    assert 2 < len(ran) < 8


async def test_no_answer_tells_much_more_than_was_asked_for(instance):
    """Whatever else waits for the server."""
    manager = instance()
    store = meta_store(manager)
    for _ in range(3):
        await manager.batch([Create(Note("1")) for _ in range(10)])
    for limit, batches in {1: 1, 21: 2, 1000: 3}.items():
        start = search_replica.Position((await store._look()).store, 0, b"")
        _, _, seq, _, txids, told = await store._run(read_scripts.FOLLOW, *start, limit)
        assert (seq, len(txids), len(told)) == (3, batches, 10 * batches)


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("building", [True, False])
async def test_a_replica_takes_over_between_two_answers(instance, server, monkeypatch, building):
    """Data read beyond the copy's position is of a lost history, although both histories have the position."""
    monkeypatch.setattr(search_replica, "AT_ONCE", 1)
    manager, other = instance(), instance()
    for number in range(20):
        await manager.create(Note(f"{number}"), resource_id=f"{number}")
    if not building:
        assert await other.count() == 20
        await manager.update("0", Note("both"))
        await manager.update("1", Note("both"))
    earlier: dict[bytes, bytes] = {}

    async def lose() -> None:
        if not earlier:
            earlier.update((name, server.dump(name)) for name in server.keys(key(manager, "*")))
            for number in range(20):
                await manager.update(f"{number}", Note("lost"))

    async def take_over() -> None:
        if taken_over:
            return
        taken_over.append(True)
        server.delete(*server.keys(key(manager, "*")))
        for name, dump in earlier.items():
            server.restore(name, 0, dump)

    taken_over: list[bool] = []
    ran = meta_store(other)._replica._run

    async def run(script, *arguments):
        if script is (read_scripts.PAGE if building else read_scripts.FOLLOW):
            await lose()
            answer = await ran(script, *arguments)
            await take_over()
            return answer
        return await ran(script, *arguments)

    meta_store(other)._replica._run = run
    assert await other.count(Query(where=field("text").eq("lost"))) == 0
    assert taken_over
    assert await as_one_that_is_built_now(instance, other)


async def test_no_answer_is_applied_to_a_copy_of_another_history(instance):
    """The answer came from a replica that took over, and another event loop had brought the copy up before that."""
    manager = instance()
    await manager.create(Note("1"))
    copy = await meta_store(manager)._replica.current()
    here, heads = copy.position, {1: b"another txid 123", 2: b"the last one 123"}
    with pytest.raises(search_replica.RebuildNeeded):
        await copy.advance([], here._replace(seq=2, head=heads[2]), heads, {})
    assert copy.position == here


@pytest.mark.parametrize("writes", [0, 1, 2, 4], ids=["far behind", "behind", "as far", "ahead"])
async def test_a_replica_that_takes_over_behind_its_primary(instance, server, writes):
    """The new primary continues from an earlier state. Copies of writes that it never received must be dropped."""
    manager, other = instance(), instance()
    await manager.create(Note("1", "a"), resource_id="r")
    names = server.keys(key(manager, "*"))
    earlier = {name: server.dump(name) for name in names}
    await manager.update("r", Note("lost", "b"))
    await manager.create(Note("lost too", "c"))
    assert await other.count() == 2
    server.delete(*server.keys(key(manager, "*")))
    for name, dump in earlier.items():
        server.restore(name, 0, dump)
    kept = ["1", *(f"kept {number}" for number in range(writes))]
    for text in kept[1:]:
        await manager.create(Note(text))
    assert await texts(other) == await texts(manager) == sorted(kept)
    await manager.create(Note("free again", "c"))


async def test_a_late_answer_takes_no_copy_back(instance):
    """Event loops ask for themselves, and the answer to an earlier question may arrive later."""
    manager = instance()
    await manager.create(Note("1", "a"), resource_id="r")
    follower = meta_store(instance())
    copy = await follower._replica.current()
    run, asked, go_on = follower._run, asyncio.Event(), asyncio.Event()

    async def slow(*arguments):
        answer = await run(*arguments)
        asked.set()
        await go_on.wait()
        return answer

    await manager.update("r", Note("2", "b"))
    follower._replica._run = slow
    late = asyncio.create_task(follower._replica._refreshed())
    await asked.wait()
    follower._replica._run = run
    await manager.update("r", Note("3", "c"))
    await manager.create(Note("4"))
    assert await follower._replica.current() is copy
    go_on.set()
    assert await late is copy
    assert copy.position.seq == 4
    query = Query(where=field("text").eq("3")).resolve(manager.codec.fields)
    assert [hit.meta.version for hit in (await follower.search(query)).items] == [3]


async def test_a_store_of_which_a_part_was_evicted_says_so(instance, server):
    manager = instance()
    await manager.create(Note("1", "a"), resource_id="r")
    server.delete(key(manager, "meta"))
    for call in (manager.create(Note("2")), manager.count(), instance().open()):
        with pytest.raises(StoreDamaged, match="noeviction"):
            await call


async def test_event_loops_share_a_copy(instance):
    manager = instance()
    await manager.create(Note("1"))
    counted = []

    async def count():
        counted.extend(await asyncio.gather(*(manager.count() for _ in range(20))))

    threads = [threading.Thread(target=lambda: asyncio.run(count())) for _ in range(3)]
    for thread in threads:
        thread.start()
    await count()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert counted == [1] * 80


async def test_purge_leaves_no_trace(instance, server):
    manager, other = instance(), instance()
    for number in range(5):
        await manager.create(Note(f"kept {number}", f"{number}"))
    await manager.create(Note("secret text", "secret code"), resource_id="secret id", by=keyed("k"))
    await manager.batch(
        [
            Update(resource_id="secret id", data=Note("secret text again", "secret code")),
            Create(Note("kept 5")),
        ]
    )
    assert await other.count() == await manager.count() == 7
    await manager.purge("secret id")
    own = meta_store(manager)._replica._copy.db._connection.serialize("main")
    assert b"kept 5" in own
    assert b"secret" not in own
    for name in server.keys("*"):
        kind = server.type(name)
        read = {
            b"hash": server.hgetall,
            b"set": server.smembers,
            b"list": lambda name: server.lrange(name, 0, -1),
            b"zset": lambda name: server.zrange(name, 0, -1),
        }[kind]
        assert b"secret" not in name + repr(read(name)).encode(), name
    assert await other.count() == await manager.count() == 6
    with pytest.raises(AnswerGone):
        await manager.create(Note("secret text", "secret code"), resource_id="secret id", by=keyed("k"))
    await manager.create(Note("new", "secret code"), resource_id="secret id")
