"""The promises of a BlobStore, as tests. The package docstring explains how to run them on your own store."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest
from uuid_utils import uuid7

from ..errors import CrudError, StoreDamaged
from ..resource_manager.basic import BLOB_KEY, BlobStore, ModelSpec

MB = 1024**2
HASH = hashlib.sha256(b"").hexdigest()
HOSTILE_KEYS = [
    *("", ".", "..", "/", "../../x", "/etc/passwd", "a/b", f"{HASH}", f"{HASH}/", f"/{HASH}", "%2e%2e/x", "~", "$HOME"),
    *(f"{HASH}/..", f"{HASH}/../../x", f"../{HASH}/0-{'0' * 32}", f"{HASH}/0-{'0' * 31}", f"{HASH}/0-{'0' * 33}"),
    *(f"{HASH}/00-{'0' * 32}", f"{HASH}/-1-{'0' * 32}", f"{HASH}/0-{'A' * 32}", f"{HASH.upper()}/0-{'0' * 32}"),
    *(
        f"{HASH}/0-{'0' * 32}\n",
        f"{HASH}/0-{'0' * 32}/",
        f"{HASH}//0-{'0' * 32}",
        f"{HASH}/٣-{'0' * 32}",
        "\0",
        "\ud800",
    ),
    *(f"{HASH}/0/{'0' * 32}", "x" * 100_000, "now", "incoming", "😀"),
]
"""No one of these is a key of a blob."""


def new_uid(epoch: int = 0) -> str:
    """Return a uid that no other blob has."""
    return f"{epoch}-{uuid7().hex}"


async def stored(store: BlobStore, content: bytes, *, chunk: int = MB, uid: str | None = None) -> str:
    """Store content, which arrives in chunks of this size. Return the key."""
    async with store.receive() as writer:
        for at in range(0, len(content), chunk):
            await writer.write(content[at : at + chunk])
        return await writer.store(uid or new_uid())


async def content_of(store: BlobStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes of a blob."""
    return b"".join([chunk async for chunk in store.read(key, start, end)])


class BlobStoreConformance:
    """The promises of a BlobStore. A subclass returns the store under test from `make`."""

    durable: ClassVar[bool] = True
    """Whether stored blobs survive the end of the process."""

    @abstractmethod
    def make(self, root: Path) -> BlobStore:
        """Return the store under test. If it is durable, two stores that are made for one root have the same blobs."""

    def bound(self, root: Path) -> BlobStore:
        """Return the store under test, bound to a model."""
        store = self.make(root)
        store.bind(ModelSpec("item"))
        return store

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[BlobStore]:
        """Give an empty store, and close it afterwards."""
        store = self.bound(tmp_path / "store")
        yield store
        await store.close()

    async def test_the_store_declares_its_durability(self, store: BlobStore) -> None:
        assert store.durable is self.durable
        await store.health()
        assert await store.degradations() == []

    @pytest.mark.parametrize("size", [0, 1, 1000, 256 * 1024, 256 * 1024 + 1, 3 * MB, 20 * MB])
    async def test_any_content(self, store: BlobStore, size: int) -> None:
        content = (bytes(range(256)) * (size // 256 + 1))[:size]
        digest = hashlib.sha256(content).hexdigest()
        uid = new_uid(7)
        async with store.receive() as writer:
            assert (writer.size, writer.sha256) == (0, HASH)
            for at in range(0, size, 300_001):
                await writer.write(content[at : at + 300_001])
            assert (writer.size, writer.sha256) == (size, digest)
            key = await writer.store(uid)
        assert key == f"{digest}/{uid}"
        assert BLOB_KEY.fullmatch(key)
        chunks = [chunk async for chunk in store.read(key)]
        assert b"".join(chunks) == content
        assert max(map(len, chunks), default=0) <= MB

    async def test_small_and_empty_chunks(self, store: BlobStore) -> None:
        async with store.receive() as writer:
            for number in range(2000):
                await writer.write(b"%d" % (number % 10))
                await writer.write(b"")
            key = await writer.store(new_uid())
        assert await content_of(store, key) == b"0123456789" * 200

    async def test_ranges(self, store: BlobStore) -> None:
        content = bytes(range(251)) * 4000
        key = await stored(store, content)
        last = len(content)
        for start, end in [
            (0, 1),
            (5, 5),
            (17, 600_000),
            (last - 1, last),
            (0, last),
            (300_000, None),
            (0, 0),
            (0, None),
        ]:
            assert await content_of(store, key, start, end) == content[start:end]

    async def test_a_range_that_is_not_there_is_damage(self, store: BlobStore) -> None:
        key = await stored(store, b"0123456789")
        for start, end in [(0, 11), (9, 12), (10, 11), (50, 60)]:
            with pytest.raises(StoreDamaged):
                await content_of(store, key, start, end)
        empty = await stored(store, b"")
        assert await content_of(store, empty, 0, 0) == b""
        with pytest.raises(StoreDamaged):
            await content_of(store, empty, 0, 1)

    @pytest.mark.parametrize("range_", [(0, None), (0, 0), (3, 5)])
    async def test_a_missing_blob_is_damage(self, store: BlobStore, range_: tuple[int, int | None]) -> None:
        await stored(store, b"")
        with pytest.raises(StoreDamaged):
            await content_of(store, f"{HASH}/{new_uid()}", *range_)

    @pytest.mark.parametrize("key", HOSTILE_KEYS)
    async def test_a_key_is_never_a_path(self, store: BlobStore, tmp_path: Path, key: str) -> None:
        beside = tmp_path / "x"
        beside.write_bytes(b"precious")
        kept = await stored(store, b"kept")
        with pytest.raises(StoreDamaged):
            await content_of(store, key)
        await store.delete([key, f"{kept}/../../x"])
        assert await content_of(store, kept) == b"kept"
        assert beside.read_bytes() == b"precious"
        uid = key.rpartition("/")[2] if key.startswith(HASH) else key
        if BLOB_KEY.fullmatch(f"{HASH}/{uid}") is None:
            async with store.receive() as writer:
                with pytest.raises(ValueError):  # noqa: PT011 - the contract says no more
                    await writer.store(uid)
        assert await store.older_than(0) == [kept]
        assert {path.name for path in tmp_path.iterdir()} <= {"x", "store"}

    async def test_uploads_that_are_not_stored_leave_nothing(self, store: BlobStore) -> None:
        async with store.receive() as writer:
            await writer.write(b"left")
        with contextlib.suppress(KeyError):
            async with store.receive() as writer:
                await writer.write(bytes(MB))
                raise KeyError
        assert await store.older_than(0) == []

    async def test_a_cancelled_upload_leaves_nothing(self, store: BlobStore) -> None:
        begun = asyncio.Event()

        async def upload() -> None:
            async with store.receive() as writer:
                while True:
                    await writer.write(bytes(400_000))
                    begun.set()
                    await asyncio.sleep(0)

        for wait in (0, 0.001, 0.01):
            begun.clear()
            task = asyncio.create_task(upload())
            await begun.wait()
            await asyncio.sleep(wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await store.older_than(0) == []
        assert await content_of(store, await stored(store, b"next")) == b"next"

    @pytest.mark.parametrize("size", [5, 2 * MB])
    async def test_uploads_of_equal_content_are_two_blobs(self, store: BlobStore, size: int) -> None:
        content = b"x" * size
        keys = await asyncio.gather(*(stored(store, content) for _ in range(8)))
        assert len(set(keys)) == 8
        assert len({key.partition("/")[0] for key in keys}) == 1
        await store.delete(keys[:4])
        for key in keys[:4]:
            with pytest.raises(StoreDamaged):
                await content_of(store, key)
        assert await asyncio.gather(*(content_of(store, key) for key in keys[4:])) == [content] * 4

    async def test_stores_and_deletions_of_equal_content_at_the_same_time(self, store: BlobStore) -> None:
        async def use(number: int) -> None:
            for _ in range(6):
                key = await stored(store, b"equal")
                assert await content_of(store, key) == b"equal"
                if number % 2:
                    await store.delete([key])

        await asyncio.gather(*map(use, range(6)))
        assert len(await store.older_than(0)) == 3 * 6

    @pytest.mark.parametrize("size", [5, 2 * MB])
    @pytest.mark.parametrize("removed", [False, True])
    async def test_an_upload_may_be_stored_again_under_another_uid(
        self, store: BlobStore, size: int, removed: bool
    ) -> None:
        """The row of the first blob was refused, or it is unknown. A sweep may have removed its content already."""
        content = b"y" * size
        async with store.receive() as writer:
            await writer.write(content)
            first = await writer.store(new_uid(1))
            if removed:
                await store.delete([first])
            second = await writer.store(new_uid(2))
            third = await writer.store(new_uid(3))
        left = [second, third] if removed else [first, second, third]
        assert await store.older_than(0) == left
        await store.delete([first, second])
        assert await content_of(store, third) == content
        assert await store.older_than(0) == [third]

    async def test_a_deleted_blob_is_gone(self, store: BlobStore) -> None:
        keys = [await stored(store, b"%d" % number) for number in range(30)]
        await store.delete([])
        await store.delete([f"{HASH}/{new_uid()}"])
        await store.delete([*keys[:20], f"{HASH}/{new_uid()}"])
        await store.delete(keys[:20])
        assert await store.older_than(0) == sorted(keys[20:])

    async def test_a_reader_of_a_blob_that_is_deleted_gets_no_wrong_bytes(self, store: BlobStore) -> None:
        content = bytes(range(256)) * 16 * 1024
        key = await stored(store, content)
        received = b""
        with contextlib.suppress(CrudError):
            async for chunk in store.read(key):
                if not received:
                    await store.delete([key])
                received += chunk
        assert received == content[: len(received)]

    async def test_a_read_may_be_left(self, store: BlobStore) -> None:
        key = await stored(store, bytes(3 * MB))
        for _ in range(50):
            async for chunk in store.read(key):
                assert chunk
                break
        assert len(await content_of(store, key)) == 3 * MB

    async def test_pages_of_old_blobs(self, store: BlobStore) -> None:
        keys = sorted([await stored(store, b"%d" % (number % 7), uid=new_uid(number)) for number in range(25)])
        assert await store.older_than(0) == keys
        assert await store.older_than(0, limit=10) == keys[:10]
        assert await store.older_than(0, keys[9], 10) == keys[10:20]
        assert await store.older_than(0, keys[-1]) == []
        await store.delete([keys[3]])
        assert await store.older_than(0, keys[3]) == keys[4:]
        assert await store.older_than(3600) == []

    async def test_the_age_counts_from_the_end_of_the_upload(self, store: BlobStore) -> None:
        async with store.receive() as writer:
            await writer.write(bytes(300_000))
            early = await stored(store, b"early")
            await asyncio.sleep(3)
            late = await writer.store(new_uid())
        assert await store.older_than(2) == [early]
        assert await store.older_than(0) == sorted([early, late])

    async def test_a_closed_store_can_be_used_again(self, store: BlobStore) -> None:
        key = await stored(store, bytes(MB))
        await store.close()
        await store.close()
        assert await content_of(store, key) == bytes(MB)
        assert await content_of(store, await stored(store, bytes(2 * MB))) == bytes(2 * MB)
        await store.maintain(10)
        assert len(await store.older_than(0)) == 2

    async def test_another_store_at_the_same_place(self, tmp_path: Path) -> None:
        first, second = self.bound(tmp_path / "store"), self.bound(tmp_path / "store")
        key = await stored(first, b"here")
        if self.durable:
            assert await content_of(second, key) == b"here"
            await second.delete([key])
            assert await first.older_than(0) == []
        else:
            assert await second.older_than(0) == []
        for store in (first, second):
            await store.close()

    def test_places_of_two_stores(self, tmp_path: Path) -> None:
        first, second, other = (self.bound(tmp_path / name).location_key for name in ("store", "store", "other"))
        assert (first == second, first == other) == (True, first is None)

    async def test_many_event_loops(self, tmp_path: Path) -> None:
        store = self.bound(tmp_path / "store")
        failed: list[BaseException] = []

        async def use(thread: int) -> None:
            for number in range(5):
                content = b"%d %d" % (thread, number) * 100_000
                key = await stored(store, content)
                assert await content_of(store, key) == content
                if number == thread:
                    await store.close()

        def run(thread: int) -> None:
            try:
                asyncio.run(use(thread))
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert failed == []
        assert len(await store.older_than(0)) == 15
        await store.close()
