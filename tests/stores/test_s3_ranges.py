"""An S3 server that ignores `Range`: what is stored can be read, and nothing is imported into packs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from uuid_utils import uuid7

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.errors import RangesUnsupported
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore


class Whole(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str | None]] = []

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        self.asked.append(self.headers["range"])
        body = self.objects.get(self.path)
        self._answer(404 if body is None else 200, body or b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"e"')
        self.send_header("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def objects() -> Iterator[S3ObjectStore]:
    Whole.objects.clear()
    Whole.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Whole) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield S3ObjectStore(uuid4().hex, url, "key", "secret", "us-east-1")
        server.shutdown()


async def test_objects_are_read_as_a_whole(objects):
    await objects.put("k", b"content")
    with pytest.raises(RangesUnsupported, match="does not support ranges"):
        await objects.get_range("k", 1, 3)
    Whole.asked.clear()
    for _ in range(3):
        assert await objects.read("k") == b"content"
        assert await objects.read("missing") is None
    assert [asked is not None for asked in Whole.asked] == [True, *[False] * 6]


async def test_an_import_is_refused(objects):
    store = S3ResourceStore("b", prefix="data/", object_store=objects)
    bodies = [b"{}" * 9, b"{}"]
    uids = store.uid_allotment(lambda: f"0/{uuid7()}")
    named: list[Any] = [(SimpleNamespace(uid=uids.uid_for(body)), body) for body in bodies]
    with pytest.raises(ConfigError, match="run `crudstack s3-check`, and use a server that supports ranges"):
        await store.put_many(named)
