"""The limits of bodies: a dict, SQLite, obstore. See `limits`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import obstore
from obstore.store import S3Store

from app.autocrud.resource_manager.backends.s3.object_store import s3
from app.autocrud.resource_manager.basic import RevisionInfo
from app.autocrud.resource_manager.resource_store.cache import Cache, DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from benchmarks.article import article
from benchmarks.scripts.limits import Pair, Side
from benchmarks.scripts.limits_meta import creates
from benchmarks.scripts.ours import Article

SIZES = {"380 bytes": None, "4 KB": 4096, "64 KB": 65536}
BODIES = 100

_decode = msgspec.json.Decoder(Article).decode


def bodies(size: int | None) -> dict[str, bytes]:
    """Articles by uid, with a content of that size."""
    made = {}
    for number in range(BODIES):
        fields = article(number)
        if size is not None:
            fields["content"] = "lorem ipsum " * (size // 12)
        made[f"0/{number:032}"] = msgspec.json.encode(msgspec.convert(fields, Article))
    return made


def record() -> RevisionInfo:
    (change,) = creates(1)
    assert change.record is not None
    return change.record


async def pairs(stack: contextlib.AsyncExitStack, directory: Path) -> dict[str, Pair]:
    bucket, endpoint = os.environ["CRUDSTACK_BUCKET"], os.environ["CRUDSTACK_S3_ENDPOINT_URL"]
    objects = s3(bucket, endpoint, region_name="us-east-1")
    info = record()

    async def cached(cache: Cache, name: str, kept: dict[str, bytes]) -> CachedS3ResourceStore:
        store = CachedS3ResourceStore([cache], bucket=bucket, prefix=f"limits/{name}/", object_store=objects)
        stack.push_async_callback(store.close)
        await asyncio.gather(*(store.put(uid, info, body) for uid, body in kept.items()))
        return store

    found: dict[str, Pair] = {}
    for name, size in SIZES.items():
        kept = bodies(size)
        found[f"body in memory, {name} / dict"] = _in_memory(await cached(MemoryCache(), f"memory {name}", kept), kept)
    for name in ("380 bytes", "64 KB"):
        kept = bodies(SIZES[name])
        store = await cached(DiskCache(directory / name / "ours"), f"disk {name}", kept)
        found |= _on_disk(stack, store, kept, directory / name, name)
    raw = S3Store(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    plain = S3ResourceStore(bucket, "limits/plain/", object_store=objects)
    return found | await _on_s3(plain, raw, info)


def _side(call: Callable[[str], object], uids: Sequence[str]) -> Side:
    async def read(keys: Sequence[str]) -> None:
        for key in keys:
            await call(key)  # type: ignore[misc]

    return Side(read, lambda times: [uids[at % len(uids)] for at in range(times)])


def _in_memory(store: CachedS3ResourceStore, kept: dict[str, bytes]) -> Pair:
    async def ours(keys: Sequence[str]) -> None:
        for key in keys:
            _decode(await store.get(key))

    async def raw(keys: Sequence[str]) -> None:
        for key in keys:
            _decode(kept[key])

    uids = list(kept)

    def arguments(times: int) -> Sequence[str]:
        return [uids[at % BODIES] for at in range(times)]

    async def same() -> bool:
        return await store.get_many(uids) == [kept[uid] for uid in uids]

    return Pair(Side(raw, arguments), Side(ours, arguments), same, 10_000, 100)


def _on_disk(
    stack: contextlib.AsyncExitStack, store: CachedS3ResourceStore, kept: dict[str, bytes], directory: Path, name: str
) -> dict[str, Pair]:
    database = stack.enter_context(
        contextlib.closing(sqlite3.connect(directory / "bodies.sqlite", check_same_thread=False))
    )
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE body (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
    with database:
        database.executemany("INSERT INTO body VALUES (?, ?)", kept.items())
    thread = stack.enter_context(ThreadPoolExecutor(1))
    loop, uids = asyncio.get_running_loop(), list(kept)

    def select(uid: str) -> bytes:
        return bytes(database.execute("SELECT value FROM body WHERE key = ?", (uid,)).fetchone()[0])

    async def same() -> bool:
        bodies = [await loop.run_in_executor(thread, select, uid) for uid in uids]
        return bodies == await store.get_many(uids) == list(kept.values())

    raw = _side(lambda uid: loop.run_in_executor(thread, select, uid), uids)
    return {f"body on disk, {name} / SELECT in a thread": Pair(raw, _side(store.get, uids), same)}


async def _on_s3(store: S3ResourceStore, raw: S3Store, info: RevisionInfo) -> dict[str, Pair]:
    kept = bodies(None)
    for uid, body in kept.items():
        await store.put(uid, info, body)

    async def get(uid: str) -> bytes:
        return bytes(await (await obstore.get_async(raw, f"limits/plain/{uid}")).bytes_async())

    async def put(uid: str) -> None:
        await obstore.put_async(raw, f"limits/plain/{uid}", kept[uid])

    async def same() -> bool:
        return [await get(uid) for uid in uids] == await store.get_many(uids) == list(kept.values())

    uids = list(kept)
    return {
        "S3 get / obstore": Pair(_side(get, uids), _side(store.get, uids), same, 200),
        "S3 put / obstore": Pair(_side(put, uids), _side(lambda uid: store.put(uid, info, kept[uid]), uids), same, 200),
    }
