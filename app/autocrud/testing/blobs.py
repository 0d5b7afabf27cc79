"""The rows of blobs, and their uses by records: F1 to F3 and F5 of `contract.blobs`.

The tests run for every storage whose stores have the ability `BlobRows`. They need no BlobStore: rows have no content
here, and `NamedBlobs` adds keys to the records that the engine commits.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from msgspec.structs import replace

from ..errors import BlobGone, BlobQuotaExceeded, StaleGeneration, UniqueConflict
from ..resource_manager.basic import BlobRow, IdempotentCommit, IStorage, ResourceMeta, Write
from ..resource_manager.contract.blobs import BlobRows, BlobUsage, BlobUse
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import Create, Modify, Operation, Publish, Purge, Retention, Switch, Update
from ..resource_manager.records import blob_epoch_of, owner_of
from .base import ROUNDS, Conformance
from .model import Item, manage, storage_of

CONTENTS = (b"", b"one", b"two")
"""The contents of the uploads of the tests; few, so that uploads with equal content are frequent."""


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of a content, in hex."""
    return hashlib.sha256(content).hexdigest()


def upload(content: bytes = b"one", *, epoch: int = 0, by: str = "alice") -> BlobRow:
    """Return the row of a new upload. Nothing is stored."""
    return BlobRow(key=f"{sha256_of(content)}/{epoch}-{uuid4().hex}", size=len(content), owner=owner_of(by))


def blob_rows_of(manager: ResourceManager[Item]) -> BlobRows:
    """Return the store that keeps the rows: the ResourceStore if its records are the commit, else the MetaStore.

    Skips the test if that store has no rows of blobs.
    """
    storage = storage_of(manager)
    store = storage.meta_store if storage._records is None else storage.resource_store
    if not isinstance(store, BlobRows):
        pytest.skip(f"{type(store).__name__} has no rows of blobs")
    return store


class NamedBlobs:
    """Adds keys of blobs to the records that a storage commits, as Blob fields of a model would.

    by_resource  keys for the records of a resource, by its id
    in_order     keys for the records of the next commit, in the order of its writes; they take precedence
    """

    def __init__(self, storage: IStorage) -> None:
        self.by_resource: dict[str, tuple[str, ...]] = {}
        self.in_order: Sequence[tuple[str, ...]] = ()
        self._commit = storage.commit
        storage.commit = self._commit_with_keys  # type: ignore[method-assign]

    async def _commit_with_keys(
        self, writes: Sequence[Write], once: IdempotentCommit | None = None
    ) -> list[ResourceMeta]:
        keys = iter(self.in_order)
        named = []
        for change, body in writes:
            if change.record is not None:
                blobs = next(keys, self.by_resource.get(change.meta.resource_id, change.record.blobs))
                change = replace(change, record=replace(change.record, blobs=tuple(sorted(blobs))))
            named.append(Write(change, body))
        return await self._commit(named, once)


WRITES: dict[str, Callable[[ResourceManager[Item], str], Awaitable[object]]] = {
    "create": lambda manager, _: manager.create(Item(text="2"), resource_id="new"),
    "update": lambda manager, rid: manager.update(rid, Item(text="2")),
    "modify": lambda manager, rid: manager.modify(rid, Item(text="2")),
    "patch": lambda manager, rid: manager.patch(rid, lambda data: data | {"text": "2"}),
    "publish": lambda manager, rid: manager.publish(rid),
}
"""The operations that store a record, applied to a draft."""


class BlobConformance(Conformance):
    """The rows of blobs, and their uses by records."""

    @pytest.fixture
    async def rows(self, manager: ResourceManager[Item]) -> BlobRows:
        """Return the rows of blobs of the storage under test."""
        rows = blob_rows_of(manager)
        await manager.open()
        return rows

    @pytest.fixture
    def names(self, manager: ResourceManager[Item]) -> NamedBlobs:
        """Return the keys that records of the storage under test will name."""
        return NamedBlobs(manager.storage)

    async def test_a_new_model_has_no_blobs(self, rows: BlobRows) -> None:
        assert await rows.blob_epoch() == 0
        assert await rows.blob_usage() == BlobUsage(0, 0)
        assert await rows.blobs([sha256_of(b"one")]) == []
        assert await rows.blob_uses(upload().key) == []

    async def test_rows_are_found_by_their_hashes(self, rows: BlobRows) -> None:
        stored = [upload(content, by=by) for content in CONTENTS for by in ("alice", "bob", "ä" * 40)]
        for row in stored:
            await rows.add_blob(row)
        wanted = [sha256_of(content) for content in CONTENTS[1:]]
        expected = sorted((row for row in stored if row.sha256 in wanted), key=lambda row: row.key)
        assert await rows.blobs([*wanted, wanted[0], sha256_of(b"other")]) == expected
        assert await rows.blobs([sha256_of(b"")]) == sorted(stored[:3], key=lambda row: row.key)
        assert await rows.blobs([]) == await rows.blobs([sha256_of(b"other")]) == []

    async def test_a_row_is_stored_once(self, rows: BlobRows) -> None:
        row = upload(b"two")
        for _ in range(3):
            await rows.add_blob(row, quota=3)
        assert await rows.blobs([row.sha256]) == [row]
        assert await rows.blob_usage() == BlobUsage(1, 3)

    async def test_the_usage_is_the_sum_of_all_rows(self, rows: BlobRows) -> None:
        large = replace(upload(), size=5 * 2**40)
        for row in (large, upload(b""), upload(b"one"), upload(b"one")):
            await rows.add_blob(row)
        assert await rows.blob_usage() == BlobUsage(4, 5 * 2**40 + 6)
        assert await rows.remove_blobs([large.key]) == [large.key]
        assert await rows.blob_usage() == BlobUsage(3, 6)

    async def test_a_row_beyond_the_quota_is_refused(self, rows: BlobRows) -> None:
        with pytest.raises(BlobQuotaExceeded):
            await rows.add_blob(upload(b"one"), quota=2)
        assert await rows.blob_usage() == BlobUsage(0, 0)
        row = upload(b"one")
        await rows.add_blob(row, quota=3)
        with pytest.raises(BlobQuotaExceeded):
            await rows.add_blob(upload(b"two"), quota=5)
        await rows.add_blob(upload(b""), quota=3)
        assert await rows.blob_usage() == BlobUsage(2, 3)
        await rows.remove_blobs([row.key])
        await rows.add_blob(upload(b"two"), quota=3)

    async def test_concurrent_rows_share_the_quota(self, rows: BlobRows) -> None:
        results = await asyncio.gather(
            *(rows.add_blob(upload(b"one"), quota=12) for _ in range(10)), return_exceptions=True
        )
        assert sum(result is None for result in results) == 4
        assert sum(isinstance(result, BlobQuotaExceeded) for result in results) == 6
        assert await rows.blob_usage() == BlobUsage(4, 12)

    # F1

    @pytest.mark.parametrize("write", WRITES)
    async def test_a_record_with_an_unknown_blob_is_refused(
        self, write: str, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        before = (await manager.create(Item(text="1"), resource_id="r", status="draft")).meta
        known, unknown = upload(), upload()
        for others in ((), (known.key,)):  # in a model without any blob, and in one with some
            names.by_resource = dict.fromkeys(("new", "r"), (*others, unknown.key))
            with pytest.raises(BlobGone):
                await WRITES[write](manager, "r")
            await rows.add_blob(known)
        assert (await manager.get("r")).meta == before
        assert await manager.count() == 1
        assert await rows.blob_uses(known.key) == []
        names.by_resource = dict.fromkeys(("new", "r"), (known.key,))
        await WRITES[write](manager, "r")
        assert len(await rows.blob_uses(known.key)) == 1

    async def test_a_removed_row_is_gone_for_records(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        row = upload()
        await rows.add_blob(row)
        assert await rows.remove_blobs([row.key]) == [row.key]
        assert await rows.blobs([row.sha256]) == []
        names.by_resource["r"] = (row.key,)
        with pytest.raises(BlobGone):
            await manager.create(Item(), resource_id="r")

    async def test_a_batch_with_an_unknown_blob_stores_nothing(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        row = upload()
        await rows.add_blob(row)
        names.in_order = [(row.key,), (row.key,), (upload().key,)]
        with pytest.raises(BlobGone):
            await manager.batch([Create(Item(text="1"), "a"), Create(Item(text="2"), "b"), Create(Item(text="3"), "c")])
        assert await manager.count() == 0
        assert await rows.blob_uses(row.key) == []
        assert await rows.remove_blobs([row.key]) == [row.key]

    async def test_the_uses_are_those_of_the_stored_records(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        first, second = upload(b"one"), upload(b"two")
        keys = [first.key, second.key]
        for row in (first, second):
            await rows.add_blob(row)

        async def assert_uses(*revisions: int | None) -> None:
            """Compare the newest revision of `r` that names each blob. No used blob can be removed."""
            for key, revision in zip(keys, revisions, strict=True):
                assert await rows.blob_uses(key) == ([] if revision is None else [BlobUse("r", revision)])
            if None not in revisions:
                assert await rows.remove_blobs(keys) == []

        names.by_resource["r"] = (first.key, second.key)
        await manager.create(Item(text="1"), resource_id="r", status="draft")
        await assert_uses(1, 1)
        names.by_resource["r"] = (first.key,)
        await manager.modify("r", Item(text="2"))
        await assert_uses(1, None)
        names.by_resource["r"] = (second.key, first.key)
        await manager.modify("r", Item(text="3"))
        await assert_uses(1, 1)
        names.by_resource["r"] = (first.key,)
        await manager.publish("r")
        await assert_uses(1, None)
        names.by_resource["r"] = (second.key,)
        await manager.update("r", Item(text="4"))
        await assert_uses(1, 2)
        names.by_resource["r"] = ()
        await manager.update("r", Item(text="5"))
        await assert_uses(1, 2)
        await manager.switch("r", 1)
        await assert_uses(1, 2)
        await manager.delete("r")
        await assert_uses(1, 2)
        await manager.restore("r")
        await assert_uses(1, 2)
        await manager.purge("r")
        await assert_uses(None, None)
        assert await rows.remove_blobs(keys) == keys
        assert await rows.blob_usage() == BlobUsage(0, 0)

    async def test_retention_ends_the_uses_of_the_revisions_that_it_removes(self, root: Path) -> None:
        manager = manage(self.make(root), retention=Retention(last=2))
        rows, names = blob_rows_of(manager), NamedBlobs(manager.storage)
        await manager.open()
        old, new = upload(b"one"), upload(b"two")
        for row in (old, new):
            await rows.add_blob(row)
        names.by_resource["r"] = (old.key,)
        await manager.create(Item(text="1"), resource_id="r")
        names.by_resource["r"] = (new.key,)
        await manager.update("r", Item(text="2"))
        assert await rows.remove_blobs([old.key, new.key]) == []
        await manager.update("r", Item(text="3"))
        assert await rows.remove_blobs([old.key, new.key]) == [old.key]
        assert await rows.blob_uses(new.key) == [BlobUse("r", 3)]
        await manager.close()

    async def test_a_blob_is_in_use_once_for_each_resource(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        row = upload()
        await rows.add_blob(row)
        ids = [f"{number:02}" for number in range(12)]
        names.by_resource = dict.fromkeys(ids, (row.key,))
        await manager.batch([Create(Item(text="1"), rid) for rid in reversed(ids)])
        await manager.batch([Update(resource_id=rid, data=Item(text="2")) for rid in ids[:6]])
        expected = [BlobUse(rid, 2 if rid in ids[:6] else 1) for rid in ids]
        assert await rows.blob_uses(row.key) == expected
        assert await rows.blob_uses(row.key, limit=5) == expected[:5]
        for rid in ids[:-1]:
            await manager.purge(rid)
        assert await rows.blob_uses(row.key, limit=1) == [BlobUse(ids[-1], 1)]
        assert await rows.remove_blobs([row.key]) == []

    async def test_each_change_of_a_batch_counts(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        one, two, three = stored = [upload(content) for content in CONTENTS]
        for row in stored:
            await rows.add_blob(row)
        batch: list[Operation] = [
            Create(Item(text="1"), "a", "draft"),
            Modify(resource_id="a", data=Item(text="2")),
            Publish(resource_id="a"),
            Update(resource_id="a", data=Item(text="3")),
            Switch(resource_id="a", revision=1),
            Create(Item(text="1"), "b"),
            Purge(resource_id="b"),
        ]
        names.in_order = [(one.key,), (two.key,), (two.key,), (three.key, two.key), (one.key, three.key)]
        await manager.batch(batch)
        assert await rows.blob_uses(one.key) == []
        assert await rows.blob_uses(two.key) == [BlobUse("a", 2)]
        assert await rows.blob_uses(three.key) == [BlobUse("a", 2)]
        assert await rows.remove_blobs([row.key for row in stored]) == [one.key]

    async def test_records_keep_the_keys_of_their_blobs(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        stored = [upload(content) for content in CONTENTS]
        for row in stored:
            await rows.add_blob(row)
        names.by_resource["r"] = keys = tuple(sorted(row.key for row in stored))
        await manager.create(Item(text="1"), resource_id="r")
        names.by_resource["r"] = ()
        await manager.update("r", Item(text="2"))
        assert (await manager.storage.revision("r", 1)).blobs == keys
        assert (await manager.storage.revision("r", 2)).blobs == ()
        page = await manager.storage.revisions("r")
        assert [info.blobs for info in page.items] == [(), keys]

    # F2

    async def test_only_unused_blobs_are_removed_and_unknown_keys_raise_the_epoch(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        used, unused, unknown = upload(), upload(), upload(epoch=6)
        for row in (used, unused):
            await rows.add_blob(row)
        names.by_resource["r"] = (used.key,)
        await manager.create(Item(), resource_id="r")
        assert await rows.remove_blobs([unused.key, used.key, unused.key]) == [unused.key]
        assert await rows.blob_epoch() == 0
        assert await rows.remove_blobs([used.key, unknown.key]) == [unknown.key]
        assert await rows.blob_epoch() == 7
        assert await rows.remove_blobs([unknown.key, unused.key]) == [unknown.key, unused.key]
        assert await rows.remove_blobs([]) == []
        assert await rows.remove_blobs([earlier := upload(epoch=2).key]) == [earlier]
        assert await rows.blob_epoch() == 7
        assert await rows.blobs([used.sha256]) == [used]

    async def test_a_row_of_an_earlier_epoch_is_refused(self, rows: BlobRows) -> None:
        earlier, late = upload(), upload()
        await rows.add_blob(earlier)
        assert await rows.remove_blobs([late.key]) == [late.key]
        epoch = await rows.blob_epoch()
        assert epoch == 1
        for row in (late, upload(), replace(upload(), size=10**9)):
            with pytest.raises(StaleGeneration):
                await rows.add_blob(row, quota=100)
        await rows.add_blob(earlier)  # it is stored, so there is nothing to refuse
        again = upload(epoch=epoch)
        await rows.add_blob(again)
        assert await rows.blobs([again.sha256]) == sorted([earlier, again], key=lambda row: row.key)

    async def test_a_model_without_rows_has_an_epoch(self, manager: ResourceManager[Item], rows: BlobRows) -> None:
        assert await rows.remove_blobs([upload(epoch=3).key, upload(epoch=2).key, upload(epoch=3).key])
        assert await rows.blob_epoch() == 4
        with pytest.raises(StaleGeneration):
            await rows.add_blob(upload(epoch=3))
        await manager.create(Item())
        await rows.add_blob(upload(epoch=4))
        assert await rows.blob_usage() == BlobUsage(1, 3)
        assert await rows.blob_epoch() == 4

    # F5

    async def test_unique_fields_are_kept_beside_blobs(self, manager: ResourceManager[Item], rows: BlobRows) -> None:
        await manager.create(Item(code="c"), resource_id="r")
        await rows.add_blob(upload())
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c"))
        await manager.update("r", Item(code="d"))
        await manager.create(Item(code="c"))
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="d"))
        await manager.maintain(10)

    # Races

    async def test_a_blob_is_removed_or_named_but_never_both(
        self, manager: ResourceManager[Item], rows: BlobRows, names: NamedBlobs
    ) -> None:
        """Several tasks name a blob, remove its row, and purge the resource that names it."""
        for round_ in range(ROUNDS):
            row = upload(epoch=await rows.blob_epoch())
            await rows.add_blob(row)
            ids = [f"{round_}-{at}" for at in range(4)]
            names.by_resource = dict.fromkeys([*ids, f"{round_}-first"], (row.key,))
            work: list[Callable[[], Awaitable[object]]] = [
                *(lambda rid=rid: manager.create(Item(), resource_id=rid) for rid in ids),
                *[lambda row=row: rows.remove_blobs([row.key])] * 2,
            ]
            if round_ % 2:
                await manager.create(Item(), resource_id=f"{round_}-first")
                work.append(lambda round_=round_: manager.purge(f"{round_}-first"))  # type: ignore[misc]
            random.Random(round_).shuffle(work)
            results = await asyncio.gather(*(call() for call in work), return_exceptions=True)
            failures = [result for result in results if isinstance(result, BaseException)]
            assert all(isinstance(failure, BlobGone) for failure in failures), failures
            removed = [row.key] in results
            stored = await rows.blobs([row.sha256])
            assert (row in stored) is not removed
            uses = [use.resource_id for use in await rows.blob_uses(row.key)]
            assert uses == ([] if removed else ids)
            assert len(failures) == (len(ids) if removed else 0)

    async def test_content_that_a_sweep_may_remove_gets_no_row(self, rows: BlobRows) -> None:
        """An upload ends while a sweep looks for its row: either the sweep finds it, or the upload is refused."""
        for round_ in range(ROUNDS):
            row = upload(epoch=await rows.blob_epoch())
            work = [rows.add_blob(row), rows.remove_blobs([row.key])]
            random.Random(round_).shuffle(work)
            results = await asyncio.gather(*work, return_exceptions=True)
            assert [row.key] in results
            assert row not in await rows.blobs([row.sha256])
            refused = any(isinstance(result, StaleGeneration) for result in results)
            assert refused is (await rows.blob_epoch() > blob_epoch_of(row.key))


class DurableBlobConformance(BlobConformance):
    """The rows of blobs in a storage that keeps them after the process ends."""

    async def test_rows_uses_and_epoch_are_there_after_a_restart(self, root: Path) -> None:
        manager = manage(self.make(root))
        rows, names = blob_rows_of(manager), NamedBlobs(manager.storage)
        await manager.open()
        used, unused, removed = upload(b"one"), upload(b"two"), upload(b"one")
        for row in (used, unused, removed):
            await rows.add_blob(row)
        names.by_resource["r"] = (used.key,)
        await manager.create(Item(text="1"), resource_id="r")
        names.by_resource["r"] = ()
        await manager.update("r", Item(text="2"))
        await rows.remove_blobs([removed.key, upload(epoch=1).key])
        await manager.close()
        manager = manage(self.make(root))
        rows, names = blob_rows_of(manager), NamedBlobs(manager.storage)
        await manager.open()
        assert await rows.blob_epoch() == 2
        assert await rows.blobs([used.sha256, unused.sha256]) == sorted([used, unused], key=lambda row: row.key)
        assert await rows.blob_usage() == BlobUsage(2, 6)
        assert await rows.blob_uses(used.key) == [BlobUse("r", 1)]
        assert (await manager.storage.revision("r", 1)).blobs == (used.key,)
        with pytest.raises(StaleGeneration):
            await rows.add_blob(upload(epoch=1))
        names.by_resource["r"] = (removed.key,)
        with pytest.raises(BlobGone):
            await manager.update("r", Item(text="3"))
        assert await rows.remove_blobs([used.key, unused.key]) == [unused.key]
        await manager.purge("r")
        assert await rows.remove_blobs([used.key]) == [used.key]
        await manager.close()

    async def test_a_field_becomes_unique_in_a_model_with_blobs(self, root: Path) -> None:
        manager = manage(self.make(root), indexed=["text"])
        rows = blob_rows_of(manager)
        await manager.create(Item(code="c"))
        await rows.add_blob(upload())
        await manager.close()
        again = manage(self.make(root))
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="c"))
        await again.close()
