"""Helpers of the tests of RedisMetaStore."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import threading
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.query import Query
from app.autocrud.resource_manager.basic import Change, IndexedField, IStorage, ResourceMeta, Version
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, ResourceManager, SimpleStorage
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing.model import Clock
from tests.tcp_proxy import TcpProxy


class RedisAndDisk(IStorageFactory):
    def __init__(self, root: Path, encoding: Encoding | None = None, url: str | None = None, prefix: str = "") -> None:
        self.root, self.encoding = root, encoding
        self.url, self.prefix = url or os.environ["TEST_VALKEY"], prefix

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(
            RedisMetaStore(self.url, prefix=self.prefix or f"{self.root.name}:{model_name}:", encoding=self.encoding),
            DiskResourceStore(self.root / model_name, encoding=self.encoding),
            DiskBlobStore(self.root / model_name / "blobs"),
        )


class Note(Struct):
    text: str
    code: str | None = None


FIELDS = ("text", IndexedField("code", unique=True))


class Instances:
    """Resource managers as several processes have them: over one prefix and one directory of bodies."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.made: list[ResourceManager[Note]] = []

    def __call__(self, fields=FIELDS, url: str | None = None, clock: Clock | None = None, **options):
        factory = RedisAndDisk(self.root, url=url or self.url, prefix=f"{self.root.name}:")
        crud = AutoCRUD(storage_factory=factory, **({} if clock is None else {"clock": clock}))
        manager = crud.add_model(Note, indexed_fields=list(fields), **options)
        self.made.append(manager)
        return manager


def meta_store(manager) -> RedisMetaStore:
    return manager.storage.meta_store


def key(manager, name: str) -> str:
    return f"{meta_store(manager)._prefix}{name}"


async def texts(manager, query: Query = Query()) -> list[str]:  # noqa: B008
    return sorted([found.data.text for found in (await manager.search(query)).items])


def keyed(name: str) -> Caller:
    return Caller("alice", key=IdempotencyKey(name))


class Proxy(TcpProxy):
    """A proxy that counts requests. While `keep` is set, it holds back what clients send, even if they disconnect."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.requests = 0
        self.keep = False
        self.kept = threading.Event()
        self.later = threading.Event()
        self.late_answers: list[bytes] = []
        self._late = None
        self.answered = threading.Event()

    def url_for(self, url: str) -> str:
        parts, port = urlsplit(url), urlsplit(self.url).port
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    def _pump(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not answers:
                    self.requests += 1
                    if self.keep:
                        self._keep(source, sink)
                elif source is self._late:
                    self.late_answers.append(data)
                    self.answered.set()
                    continue
                elif not self._flows.is_set():
                    self.held.set()
                    self._flows.wait()
                sink.sendall(data)

    def _keep(self, client, server):
        """The client loses its connection; the server gets what it had sent when a test says so."""
        self.keep, self._late = False, server
        with self._mutex:
            self._open.discard(client)
        client.shutdown(2)
        client.close()
        self.kept.set()
        self.later.wait(60)


async def lose_an_answer(proxy: Proxy, write, before_the_end=lambda: None):
    """Begin to write, let the server do it, and cut the connection before the answer arrives."""
    proxy.hold()
    task = asyncio.ensure_future(write)
    assert await asyncio.to_thread(proxy.held.wait, 60)
    before_the_end()
    proxy.cut()
    proxy.release()
    return await task


async def lose_a_request(proxy: Proxy, write):
    """Begin to write, and cut the connection before the server has the request; it gets it when `later` is set."""
    proxy.keep = True
    task = asyncio.ensure_future(write)
    assert await asyncio.to_thread(proxy.kept.wait, 60)
    return await task


def meta_commit(manager, rid: str):
    """A commit of metadata alone."""
    return meta_store(manager).commit([_create(rid)])


def _create(rid: str, **changes) -> Change:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    meta = ResourceMeta(
        resource_id=rid,
        version=1,
        nonce="n",
        revision=1,
        total_revision_count=1,
        schema_version=1,
        status="stable",
        is_deleted=False,
        uid="0/x",
        data_hash="",
        encoding=Encoding.json,
        created_time=now,
        updated_time=now,
        created_by="a",
        updated_by="a",
    )
    change = Change(meta=meta, record=None, index=None, expect="absent")
    return replace(change, **changes)


def _update(meta) -> Change:
    newer = replace(meta, version=meta.version + 1, nonce=os.urandom(4).hex())
    return Change(meta=newer, record=None, index=None, expect=Version(meta.version, meta.nonce))
