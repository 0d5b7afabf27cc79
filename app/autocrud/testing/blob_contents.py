"""The blobs of a storage with their content: uploads, reading, release, sweeps and pins. F1 to F4 and P1.

The tests run for every storage that has blobs. `NamedBlobs` adds keys to the records that the engine commits, as Blob
fields of a model would.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest

from ..errors import (
    BlobGone,
    BlobQuotaExceeded,
    BlobTooLarge,
    OutcomeUnknown,
    StoreDamaged,
    StoreUnavailable,
)
from ..resource_manager.basic import BlobRow, owner_of
from ..resource_manager.contract.blobs import BlobUsage, BlobUse
from ..resource_manager.contract.snapshots import Pinning
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import Create, Modify, Operation, Purge, Retention, Update
from ..resource_manager.records import blob_epoch_of
from .base import Conformance
from .blob_stores import content_of, new_uid, stored
from .blobs import sha256_of
from .files import LIMIT, Files
from .model import Item, manage

MB = 1024**2


class BlobContentConformance(Conformance):
    """The blobs of a storage with their content."""

    @pytest.fixture
    async def files(self, manager: ResourceManager[Item]) -> Files:
        """Return the blobs of the storage under test."""
        await manager.open()
        return Files(manager)

    # Uploads

    @pytest.mark.parametrize("size", [0, 1, 3 * MB + 5])
    async def test_an_upload_can_be_read(self, files: Files, size: int) -> None:
        content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
        async with files.blobs.receive("älice", max_size=LIMIT) as upload:
            for at in range(0, size, 200_000):
                await upload.write(content[at : at + 200_000])
            assert upload.size == size
            row = await upload.finish()
        assert (row.sha256, row.size, row.owner) == (sha256_of(content), size, owner_of("älice"))
        assert await files.content(row) == content
        assert (
            b"".join([chunk async for chunk in files.blobs.read(row.key, size // 3, size // 2)])
            == (content[size // 3 : size // 2])
        )
        assert await files.blobs.rows([row.sha256]) == [row]
        assert await files.blobs.uses(row.key) == []
        assert await files.rows.blob_usage() == BlobUsage(1, size)
        await files.create("r", row)
        assert await files.blobs.uses(row.key) == [BlobUse("r", 1)]

    async def test_each_upload_is_a_blob_of_its_own(self, files: Files) -> None:
        first, second = await asyncio.gather(files.upload(b"same", by="alice"), files.upload(b"same", by="bob"))
        assert first.key != second.key
        assert await files.blobs.rows([first.sha256]) == sorted([first, second], key=lambda row: row.key)
        await files.blobs.release([first.key])
        assert [await files.exists(row) for row in (first, second)] == [False, True]

    async def test_a_blob_that_is_too_large_is_refused_at_once(self, files: Files) -> None:
        async with files.blobs.receive("alice", max_size=1000) as upload:
            await upload.write(bytes(1000))
            with pytest.raises(BlobTooLarge, match="1000 bytes"):
                await upload.write(b"x")
        assert await files.store.older_than(0) == []
        assert await files.rows.blob_usage() == BlobUsage(0, 0)
        async with files.blobs.receive("alice", max_size=1000) as upload:
            await upload.write(bytes(1000))
            await upload.finish()

    async def test_the_quota_is_checked_while_bytes_arrive_and_at_the_end(self, files: Files) -> None:
        await files.upload(bytes(600), quota=1000)
        async with files.blobs.receive("alice", max_size=LIMIT, quota=1000) as upload:
            await upload.write(bytes(400))
            with pytest.raises(BlobQuotaExceeded, match="400 bytes left"):
                await upload.write(b"x")
        async with files.blobs.receive("alice", max_size=LIMIT, quota=1000) as upload:
            await upload.write(bytes(400))
            other = await files.upload(bytes(300), quota=1000)
            with pytest.raises(BlobQuotaExceeded):
                await upload.finish()
        assert len(await files.store.older_than(0)) == 2
        await files.blobs.release([other.key])
        await files.upload(bytes(400), quota=1000)
        assert await files.rows.blob_usage() == BlobUsage(2, 1000)

    async def test_an_unfinished_upload_leaves_nothing(self, files: Files) -> None:
        async with files.blobs.receive("alice", max_size=LIMIT) as upload:
            await upload.write(bytes(MB))
        assert await files.store.older_than(0) == []
        assert await files.rows.blob_usage() == BlobUsage(0, 0)

    async def test_an_upload_whose_row_is_refused_leaves_nothing(self, files: Files) -> None:
        unavailable = mock.AsyncMock(side_effect=StoreUnavailable("planned"))
        with mock.patch.object(files.rows, "add_blob", unavailable), pytest.raises(StoreUnavailable):
            await files.upload(b"content")
        assert await files.store.older_than(0) == []

    @pytest.mark.parametrize("committed", [True, False])
    async def test_an_upload_of_unknown_outcome_ends_with_one_row(self, files: Files, committed: bool) -> None:
        """F3: the row is not added again, because a sweep may remove the first one at any time."""
        add, added = files.rows.add_blob, list[str]()

        async def unknown(row: BlobRow, *, quota: int | None = None) -> None:
            added.append(row.key)
            if committed or len(added) > 1:
                await add(row, quota=quota)
            if len(added) == 1:
                raise OutcomeUnknown("planned")

        with mock.patch.object(files.rows, "add_blob", unknown):
            row = await files.upload(b"content")
        assert await files.content(row) == b"content"
        assert await files.blobs.rows([row.sha256]) == [row]
        assert added[-1] == row.key
        assert len(added) == len(set(added)) == (1 if committed else 2)
        assert set(await files.store.older_than(0)) == set(added)
        await files.create("r", row)
        await files.maintain()
        assert await files.store.older_than(0) == [row.key]

    async def test_an_unknown_outcome_that_stays_unknown_is_reported(self, files: Files) -> None:
        unknown = mock.AsyncMock(side_effect=OutcomeUnknown("planned"))
        with mock.patch.object(files.rows, "add_blob", unknown), pytest.raises(OutcomeUnknown):
            await files.upload(b"content")

    # References

    async def test_blobs_of_all_revisions_stay(self, files: Files) -> None:
        first, second = await files.upload(b"1"), await files.upload(b"2")
        await files.create("r", first)
        await files.update("r", 2, second)
        await files.update("r", 3)
        await files.manager.delete("r")
        for _ in range(3):
            await files.maintain()
        assert await files.content(first) == b"1"
        assert await files.content(second) == b"2"

    async def test_an_upload_without_a_reference_goes_after_its_time(self, files: Files) -> None:
        kept, unused = await files.upload(b"1"), await files.upload(b"2")
        await files.create("r", kept)
        await files.maintain(None)
        assert await files.exists(unused)
        await files.maintain()
        assert [await files.exists(row) for row in (kept, unused)] == [True, False]
        with pytest.raises(BlobGone):
            await files.create("s", unused)

    async def test_edits_of_drafts_and_retention_leave_blobs_to_the_sweep(self, root: Path) -> None:
        manager = manage(self.make(root), retention=Retention(last=1))
        files = Files(manager)  # skips the test if there are no blobs, so nothing is open yet
        await manager.open()
        drafted, first, last = [await files.upload(content) for content in (b"draft", b"first", b"last")]
        await files.create("r", drafted, status="draft")
        await files.update("r", 2, first, modify=True)
        await files.update("r", 3, last)
        await files.maintain(None)
        assert [await files.exists(row) for row in (drafted, first, last)] == [True, True, True]
        await files.maintain()
        assert [await files.exists(row) for row in (drafted, first, last)] == [False, False, True]
        await manager.close()

    # Purge

    async def test_a_purge_removes_the_blobs_of_all_revisions_at_once(self, files: Files) -> None:
        mine = [await files.upload(b"%d" % number) for number in range(4)]
        shared, other = await files.upload(b"shared"), await files.upload(b"other")
        await files.create("r", mine[0], shared, status="draft")
        await files.update("r", 2, mine[1], shared, modify=True)
        await files.update("r", 3, mine[2], mine[3])
        await files.create("s", shared, other)
        await files.manager.purge("r")
        assert [await files.exists(row) for row in (*mine[1:], shared, other)] == [False, False, False, True, True]
        assert await files.exists(mine[0]), "no revision of the purged resource named it any more"
        await files.manager.purge("s")
        await files.maintain()
        assert await files.rows.blob_usage() == BlobUsage(0, 0)
        assert await files.store.older_than(0) == []

    async def test_purges_in_a_batch_release_blobs(self, files: Files) -> None:
        rows = [await files.upload(b"%d" % number) for number in range(6)]
        await files.create("a", rows[0])
        await files.create("b", rows[1])
        files.names.in_order = [(rows[2].key,), (rows[3].key,), (rows[4].key, rows[1].key), (rows[5].key,)]
        batch: list[Operation] = [
            Update(resource_id="a", data=Item(number=2)),
            Purge(resource_id="a"),
            Create(Item(number=1), "c"),
            Purge(resource_id="c"),
            Purge(resource_id="b"),
            Create(Item(number=2), "b"),
            Update(resource_id="b", data=Item(number=3)),
        ]
        await files.manager.batch(batch)
        assert [await files.exists(row) for row in rows] == [False, True, False, False, True, True]
        assert await files.blobs.uses(rows[1].key) == [BlobUse("b", 1)]

    async def test_a_failed_purge_keeps_blobs(self, files: Files) -> None:
        row = await files.upload(b"content")
        await files.create("r", row)
        files.names.in_order = [(f"{sha256_of(b'')}/{new_uid()}",)]
        with pytest.raises(BlobGone):
            await files.manager.batch([Create(Item(), "s"), Purge(resource_id="r")])
        assert await files.exists(row)

    async def test_a_release_that_fails_is_repeated(self, files: Files) -> None:
        row = await files.upload(b"content")
        await files.create("r", row)
        failing = mock.AsyncMock(side_effect=StoreUnavailable("planned"))
        with mock.patch.object(files.store, "delete", failing), pytest.raises(OutcomeUnknown, match="it is purged"):
            await files.manager.purge("r")
        assert failing.call_count == 2
        assert await files.blobs.rows([row.sha256]) == []
        assert await files.has_content(row.key)
        await files.manager.maintain(20)
        assert not await files.has_content(row.key)

    async def test_a_release_keeps_blobs_that_are_in_use(self, files: Files) -> None:
        used, unused = await files.upload(b"1"), await files.upload(b"2")
        await files.create("r", used)
        await files.blobs.release([used.key, unused.key, unused.key, f"{used.sha256}/{new_uid()}"])
        assert [await files.exists(row) for row in (used, unused)] == [True, False]
        await files.blobs.release([])

    # Sweeps

    async def test_content_without_a_row_is_removed(self, files: Files) -> None:
        """A process was killed between the two."""
        kept = await files.upload(b"kept")
        orphan = await stored(files.store, b"orphan", uid=new_uid(await files.rows.blob_epoch()))
        await files.maintain(None)
        assert await files.has_content(orphan)
        await files.create("r", kept)
        await files.maintain()
        assert await files.store.older_than(0) == [kept.key]
        assert await files.rows.blob_epoch() == blob_epoch_of(orphan) + 1
        await files.upload(b"later")

    @pytest.mark.parametrize("sweeps", [1, 3])
    async def test_a_sweep_between_content_and_row_loses_nothing(self, files: Files, sweeps: int) -> None:
        """F2: the row is refused, and the content is stored again under another key."""
        add, left = files.rows.add_blob, [sweeps]

        async def slow(row: BlobRow, *, quota: int | None = None) -> None:
            if left[0]:
                left[0] -= 1
                await files.maintain()
                assert not await files.has_content(row.key)
            await add(row, quota=quota)

        with mock.patch.object(files.rows, "add_blob", slow):
            row = await files.upload(b"content" * 100_000)
        await files.create("r", row)
        await files.maintain()
        assert await files.content(row) == b"content" * 100_000
        assert await files.store.older_than(0) == [row.key]
        assert blob_epoch_of(row.key) == sweeps

    async def test_a_blob_that_is_named_while_a_sweep_looks_at_it_stays(self, files: Files) -> None:
        row = await files.upload(b"content")
        await files.create("r")
        remove = files.rows.remove_blobs

        async def after_update(keys: Any) -> list[str]:
            await files.update("r", 2, row)
            return await remove(keys)

        with mock.patch.object(files.rows, "remove_blobs", after_update):
            await files.maintain()
        assert await files.content(row) == b"content"

    async def test_a_sweep_that_failed_goes_on(self, files: Files) -> None:
        rows = [await files.upload(b"%d" % number) for number in range(5)]
        failing = mock.AsyncMock(side_effect=StoreUnavailable("planned"))
        with mock.patch.object(files.store, "delete", failing), pytest.raises(StoreUnavailable):
            await files.maintain()
        assert len(await files.store.older_than(0)) == len(rows)
        await files.maintain()
        assert await files.store.older_than(0) == []
        assert await files.rows.blob_usage() == BlobUsage(0, 0)

    # Pins

    @pytest.fixture
    async def pin(self, files: Files) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Add a pin, and give a function that removes it."""
        pinning = files.storage.meta_store
        if not isinstance(pinning, Pinning):
            pytest.skip(f"{type(pinning).__name__} keeps no pins")
        name = uuid4().hex

        async def remove() -> None:
            await pinning.remove_pin(name)

        await pinning.add_pin(name)
        yield remove
        await remove()

    async def test_a_pin_keeps_bodies_and_blobs(self, files: Files, pin: Callable[[], Awaitable[None]]) -> None:
        first, second, unused = [await files.upload(content) for content in (b"1", b"2", b"unused")]
        orphan = await stored(files.store, b"orphan", uid=new_uid(await files.rows.blob_epoch()))
        await files.create("r", first, status="draft")
        body = (await files.storage.get("r")).uid
        await files.update("r", 2, second, modify=True)
        for _ in range(4):
            await files.maintain()
        assert await files.storage.body(body)
        for key in (first.key, second.key, unused.key, orphan):
            assert await files.has_content(key)
        await pin()
        for _ in range(4):
            await files.maintain()
        with pytest.raises(StoreDamaged):
            await files.storage.body(body)
        assert await files.store.older_than(0) == [second.key]

    async def test_a_purge_obeys_no_pin(self, files: Files, pin: Callable[[], Awaitable[None]]) -> None:
        first, second, third = [await files.upload(content) for content in (b"1", b"2", b"3")]
        await files.create("r", first, status="draft")
        await files.create("s", third, status="draft")
        kept, purged = (await files.storage.get("s")).uid, (await files.storage.get("r")).uid
        files.names.in_order = [(second.key,), ()]
        await files.manager.batch(
            [
                Modify(resource_id="r", data=Item(number=2)),
                Purge(resource_id="r"),
                Modify(resource_id="s", data=Item(number=2)),
            ]
        )
        assert await files.storage.body(kept)
        with pytest.raises(StoreDamaged):
            await files.storage.body(purged)
        assert not await files.exists(first)
        assert not await files.exists(second)
        assert await files.has_content(third.key)

    async def test_a_pin_that_is_added_while_a_sweep_removes_rows_keeps_content(self, files: Files) -> None:
        """P1: the pins are asked for after the rows are removed."""
        pinning = files.storage.meta_store
        if not isinstance(pinning, Pinning):
            pytest.skip(f"{type(pinning).__name__} keeps no pins")
        row = await files.upload(b"content")
        await files.create("r", row, status="draft")
        remove, name = files.rows.remove_blobs, uuid4().hex

        async def pinned(keys: Any) -> list[str]:
            await pinning.add_pin(name)
            await files.update("r", 2, modify=True)
            return await remove(keys)

        with mock.patch.object(files.rows, "remove_blobs", pinned):
            await files.maintain()
        assert await files.has_content(row.key)
        await pinning.remove_pin(name)
        await files.maintain()
        assert not await files.has_content(row.key)

    async def test_a_snapshot_can_be_read_while_blobs_are_dropped(self, files: Files) -> None:
        if not isinstance(files.storage.meta_store, Pinning):
            pytest.skip(f"{type(files.storage.meta_store).__name__} keeps no pins")
        row = await files.upload(b"content" * 1000)
        await files.create("r", row, status="draft")
        async with files.storage.snapshot() as snapshot:
            if not snapshot.one_moment:
                pytest.skip("the storage cannot be read as at one moment")
            await files.update("r", 2, modify=True)
            await files.maintain()
            assert await snapshot.blob_rows([row.key]) == [row]
            assert b"".join([chunk async for chunk in snapshot.read_blob(row.key)]) == b"content" * 1000
        await files.maintain()
        assert not await files.exists(row)


class DurableBlobContentConformance(BlobContentConformance):
    """The blobs of a storage that keeps them after the process ends."""

    async def test_blobs_are_there_after_a_restart(self, root: Path) -> None:
        manager = manage(self.make(root))
        files = Files(manager)  # skips the test if there are no blobs, so nothing is open yet
        await manager.open()
        named, unnamed = await files.upload(b"named"), await files.upload(b"unnamed" * 100_000)
        await files.create("r", named)
        await manager.close()
        again = manage(self.make(root))
        await again.open()
        files = Files(again)
        assert await files.content(named) == b"named"
        assert await files.content(unnamed) == b"unnamed" * 100_000
        await files.create("s", unnamed)
        await files.manager.purge("r")
        await files.maintain()
        assert [await files.exists(row) for row in (named, unnamed)] == [False, True]
        assert await content_of(files.store, unnamed.key, 7, 14) == b"unnamed"
        await again.close()


class SharedBlobContentConformance(BlobContentConformance):
    """The blobs of a storage that several instances use at once."""

    async def test_instances_share_blobs(self, root: Path) -> None:
        managers = [manage(self.make(root)) for _ in range(2)]
        here, there = map(Files, managers)  # skips the test if there are no blobs, so nothing is open yet
        for manager in managers:
            await manager.open()
        row, unused = await here.upload(b"content"), await here.upload(b"unused")
        assert await there.content(row) == b"content"
        await there.create("r", row)
        await there.maintain()
        assert [await here.exists(one) for one in (row, unused)] == [True, False]
        await here.manager.purge("r")
        assert not await there.exists(row)
        for manager in managers:
            await manager.close()

    async def test_sweeps_of_another_instance_lose_no_upload(self, root: Path) -> None:
        """One instance uploads and names blobs, while the other one removes all that is not named."""
        managers = [manage(self.make(root)) for _ in range(2)]
        here, there = map(Files, managers)  # skips the test if there are no blobs, so nothing is open yet
        for manager in managers:
            await manager.open()
        done, pauses = asyncio.Event(), random.Random(0)

        async def sweep() -> int:
            times = 0
            while not done.is_set():
                await there.maintain()
                times += 1
                await asyncio.sleep(pauses.uniform(0, 0.05))  # without pauses, a fast store sweeps every upload
            return times

        sweeping = asyncio.create_task(sweep())
        named: dict[str, BlobRow] = {}
        for number in itertools.takewhile(lambda _: len(named) < 20, range(1000)):
            row = await here.upload(b"%d" % (number % 3))
            try:
                await here.create(f"{number}", row)
                named[f"{number}"] = row
            except BlobGone:  # it was swept before it was named
                assert row not in await here.blobs.rows([row.sha256])
        done.set()
        assert await sweeping > 1
        await there.maintain()
        assert named
        for row in named.values():
            assert await there.content(row) in (b"0", b"1", b"2")
        assert set(await there.store.older_than(0)) == {row.key for row in named.values()}
        for manager in managers:
            await manager.close()
