"""Bodies of archives: those that the server could not decode are refused, and all others are served."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from msgspec import Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.backup.errors import BadArchive
from app.autocrud.resource_manager.model.codec import canonical_json
from app.autocrud.resource_manager.model.json_shape import MAX_STORED_DEPTH as MAX_NESTING

from .archives import Content, resource, write
from .imports import KINDS, Place

GOOD = b'{"title":"t"}'
msgpack = msgspec.msgpack.encode
REFUSED = {
    "no JSON": (Encoding.json, b"not json"),
    "nothing": (Encoding.json, b""),
    "more than JSON": (Encoding.json, b'{"title":"t"}}],"next_cursor":null,"x":['),
    "a number that overflows": (Encoding.json, b'{"title":1e400}'),
    "a number that overflows in a field that the model skips": (Encoding.json, b'{"title":"t","x":1e400}'),
    "an integer of too many digits": (Encoding.json, b'{"title":"t","x":%b}' % (b"1" * 5000)),
    "no UTF-8 in a field that the model skips": (Encoding.json, b'{"title":"t","x":"\xff"}'),
    "an unpaired surrogate": (Encoding.json, rb'{"title":"\ud800"}'),
    "a byte order mark": (Encoding.json, b"\xef\xbb\xbf" + GOOD),
    "NaN": (Encoding.json, b'{"title":NaN}'),
    "a list": (Encoding.json, b"[]"),
    "null": (Encoding.json, b"null"),
    "deep nesting": (Encoding.json, b'{"x":%b%b}' % (b"[" * MAX_NESTING, b"]" * MAX_NESTING)),
    "very deep nesting": (Encoding.json, b'{"x":%b%b}' % (b"[" * 100_000, b"]" * 100_000)),
    "no MessagePack": (Encoding.msgpack, b"\xc1"),
    "no bytes": (Encoding.msgpack, b""),
    "an array": (Encoding.msgpack, b"\x90"),
    "more than MessagePack": (Encoding.msgpack, b"\x81\xa5title\xa1t\xc0"),
    "a key that JSON cannot have": (Encoding.msgpack, b"\x82\xa5title\xa1t\xc3\x01"),
    "an extension": (Encoding.msgpack, b"\x82\xa5title\xa1t\xa1x\xd4\x05x"),
    "no UTF-8": (Encoding.msgpack, b"\x82\xa5title\xa1t\xa1x\xa1\xff"),
    "an array in arrays": (Encoding.msgpack, b"\x81\xa1x" + b"\x91" * MAX_NESTING + b"\x90"),
    "a key that stands twice": (Encoding.msgpack, b"\x82\xa5title\xa1t\xa5title\xa1u"),
    "a key that stands twice inside": (Encoding.msgpack, b"\x82\xa5title\xa1t\xa1x\x91\x82\xa11\xa1a\xa11\xa1b"),
    "a key that stands twice, and as many bytes": (
        Encoding.msgpack,  # encoded again, the float takes four bytes more, as many as the lost key and its value
        b"\x84\xa5title\xa1t\xa1x\xcc\x80\xa1x\xcc\x80\xa1y\xca\x3f\xc0\x00\x00",
    ),
    "two keys that are the same number": (
        Encoding.msgpack,
        b"\x81\xa1x\x82\x01\xa1a\xcb\x3f\xf0" + b"\0" * 6 + b"\xa1b",
    ),
    "two keys that are the same as JSON": (Encoding.msgpack, msgpack({"x": {1: "a", "1": "b"}})),
    "two keys that are the same as JSON, deep inside": (
        Encoding.msgpack,
        msgpack({"x": [{"y": {b"1": 1, "MQ==": 2}}]}),
    ),
}
SERVED = {
    "another type": (Encoding.json, b'{"title":5}'),
    "nothing of the model": (Encoding.json, b"{}"),
    "a name twice": (Encoding.json, b'{"title":"s","title":"t"}'),
    "spaces and line feeds": (Encoding.json, b' {\r\n\t"title" : "t"}\n'),
    "a long integer": (Encoding.json, b'{"title":%b}' % (b"1" * 4000)),
    "a large float": (Encoding.json, b'{"title":1.7976931348623157e308}'),
    "nesting": (Encoding.json, b'{"x":%b%b}' % (b"[" * (MAX_NESTING - 1), b"]" * (MAX_NESTING - 1))),
    "another type in MessagePack": (Encoding.msgpack, b"\x81\xa5title\x05"),
    "NaN in MessagePack": (Encoding.msgpack, b"\x81\xa5title\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"),
    "bytes": (Encoding.msgpack, b"\x81\xa5title\xc4\x01a"),
    "a time": (Encoding.msgpack, b"\x81\xa5title\xd6\xff\x00\x00\x00\x00"),
    "values in longer forms": (
        Encoding.msgpack,
        b"\xdf\0\0\0\x08\xd9\x05title\xda\0\x01t\xa1b\xdd\0\0\0\x02\xc5\0\x01x\xc6\0\0\0\x01x\xa1c\xd3"
        + b"\0" * 8
        + b"\xa1d\xca"
        + b"\0" * 4
        + b"\xa1e\xde\0\x01\xa1f\xdb\0\0\0\x01x\xa1g\xdc\0\x02\xd0\1\xcd\0\1"
        + b"\xa1h\xce\0\0\0\1\xa1i\x93\xc2\xc3\xc0",
    ),
    "keys that are no text": (Encoding.msgpack, msgpack({"x": {1: "a", "2": "b", b"3": "c"}, "title": "t"})),
    "nesting in MessagePack": (Encoding.msgpack, b"\x81\xa1x" + b"\x91" * (MAX_NESTING - 2) + b"\x90"),
}


class Article(Struct):
    title: str


def hash_of(encoding: Encoding, body: bytes) -> str:
    """Return the hash of a body, or of the JSON of a body in MessagePack that can be decoded."""
    if encoding == Encoding.msgpack:
        with contextlib.suppress(msgspec.MsgspecError, TypeError, UnicodeDecodeError, RecursionError):
            body = canonical_json(msgspec.msgpack.decode(body))
    return hashlib.sha256(body).hexdigest()


async def archive_with(directory: Path, encoding: Encoding, body: bytes, digest: str = "") -> Path:
    """Return an archive in which the second revision of resource a has this body."""
    (meta, (first, (record, _))) = resource("a", [{"title": "t"}, {"title": "u"}], encoding=encoding)
    digest = digest or hash_of(encoding, body)
    bad = replace(meta, data_hash=digest), [first, (replace(record, data_hash=digest), body)]
    await write(directory / "a.tar.gz", {"article": Content(resources=[bad, resource("b", [{"title": "t"}])])})
    return directory / "a.tar.gz"


@pytest.mark.parametrize("name", REFUSED)
async def test_bodies_that_cannot_be_decoded_are_refused(tmp_path, name):
    crud = AutoCRUD()
    crud.add_model(Article)
    path = await archive_with(tmp_path, *REFUSED[name])
    with pytest.raises(BadArchive, match=r"^the body of revision 2 of resource 'a' (is|cannot|has) ") as caught:
        await crud.import_all(path)
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) < 300
    assert [meta async for meta in crud.resource_manager(Article).storage.scan()] == []
    await crud.close()


@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite"])
async def test_all_other_bodies_are_served(tmp_path, kind):
    """Also those that do not fit the model."""
    for number, (name, (encoding, body)) in enumerate(SERVED.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        crud = AutoCRUD(storage_factory=KINDS[kind](Place(directory / "data")))
        crud.add_model(Article, indexed_fields=["title"])
        app = FastAPI()
        crud.apply(app)
        await crud.import_all(await archive_with(directory, encoding, body))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            for path in ("", "?fields=title", "?title=t", "/a", "/a?fields=title", "/a/revisions/2", "/a/data"):
                response = await client.get(f"/article{path}")
                assert response.status_code == 200, (name, path, response.text)
                msgspec.json.decode(response.content)
            for path, expected in (("/a/diff?from=1&to=2", {200, 400}), ("/count", {200}), ("/a/revisions", {200})):
                response = await client.get(f"/article{path}")
                assert response.status_code in expected, (name, path, response.text)
            changed = await client.patch("/article/a", json={"title": "new"})
            assert changed.status_code in (200, 422), (name, changed.text)
            assert (await client.put("/article/a", json={"title": "newer"})).status_code == 200, name
            switched = await client.post("/article/a/switch", json={"revision": 2})
            assert switched.status_code in (200, 422), (name, switched.text)
            assert (await client.get("/article")).status_code == 200, name
        await crud.close()
