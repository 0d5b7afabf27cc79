"""A field is indexed while a real S3 server cannot return bodies: no resource disappears from a search."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD, IndexedField, Query, field
from app.autocrud.errors import StoreUnavailable, UniqueConflict
from app.autocrud.resource_manager.backends.s3.object_store import s3
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests.check_then_act_proxy import CheckThenActProxy
from tests.services import BUCKET, S3Server

COUNT = 30


class Note(Struct):
    text: str
    code: str
    number: int


FORMER = ["text", IndexedField("code", unique=True)]


class TroubledBodies(CheckThenActProxy):
    """Forwards everything. While `trouble` is set, reads of bodies fail in that way: "503", "cut" or "silent"."""

    def __init__(self, url: str) -> None:
        super().__init__(url, None)
        self.trouble = ""
        self.failed = 0
        self._over = threading.Event()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        super().__exit__(*error)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        if not (self.trouble and handler.command == "GET" and "/data/" in handler.path):
            super()._serve(handler)
            return
        self.failed += 1
        if self.trouble == "silent":
            self._over.wait(60)
        elif self.trouble == "503":
            answer = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            handler.send_response_only(503)
            handler.send_header("Content-Length", str(len(answer)))
            handler.end_headers()
            handler.wfile.write(answer)
        else:
            handler.send_response_only(200)
            handler.send_header("Content-Length", "1000")
            handler.send_header("ETag", '"0"')
            handler.send_header("Last-Modified", "Sat, 28 Nov 2026 10:00:00 GMT")
            handler.end_headers()
            handler.wfile.write(b'{"text":')
        handler.close_connection = True


def program(url: str, prefix: str, fields: list[object]) -> ResourceManager[Note]:
    objects = s3(BUCKET, url, "local", "local", "us-east-1")
    factory = S3StorageFactory(BUCKET, prefix=prefix, object_store=objects, sync_interval=None)
    return AutoCRUD(storage_factory=factory).add_model(Note, indexed_fields=fields)


def of(name: str) -> Query:
    return Query(where=field(name).gte("" if name == "text" else 0))


@pytest.mark.parametrize("trouble", ["503", "cut", "silent"])
async def test_no_resource_disappears_if_bodies_cannot_be_read(ministack_s3: S3Server, tmp_path, trouble):
    prefix = f"{tmp_path.name}/"
    former = program(ministack_s3.url, prefix, FORMER)
    for number in range(COUNT):
        await former.create(Note(f"text {number}", f"c{number}", number), resource_id=f"n{number}")
    with TroubledBodies(ministack_s3.url) as proxy:
        new = program(proxy.url, prefix, [*FORMER, "number"])
        proxy.trouble = trouble
        with pytest.raises(StoreUnavailable):
            await new.count(of("number"))
        assert proxy.failed > 0
        again = program(ministack_s3.url, prefix, FORMER)
        assert await again.count(of("text")) == COUNT
        proxy.trouble = ""
        assert await new.count(of("number")) == COUNT
        assert await new.count(of("text")) == COUNT
        assert await new.storage.degradations() == []
        for manager in (new, again, former):
            with pytest.raises(UniqueConflict):
                await manager.create(Note("", "c7", 0))
        for manager in (new, again, former):
            await manager.storage.close()


async def test_a_model_opens_although_a_body_is_lost(ministack_s3: S3Server, tmp_path):
    prefix = f"{tmp_path.name}/"
    former = program(ministack_s3.url, prefix, FORMER)
    for number in range(COUNT):
        await former.create(Note(f"text {number}", f"c{number}", number), resource_id=f"n{number}")
    await former.storage.resource_store.delete([(await former.get("n7")).meta.uid])
    for _ in range(2):  # the second instance reads the findings of the first one
        new = program(ministack_s3.url, prefix, [*FORMER, "number"])
        assert await new.count(of("number")) == COUNT - 1
        assert await new.count(of("text")) == COUNT
        (told,) = await new.storage.degradations()
        assert told.endswith(": n7")
        await new.storage.close()
    assert await former.count(of("text")) == COUNT
    await former.storage.close()
