"""Uploads over HTTP: names, types, forms, announced hashes and limits."""

from __future__ import annotations

import base64
import hashlib

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD, Blob

from .album_fixtures import CONTENT, PNG, album_fixture, api_fixture, crud_and_app_fixture, crud_fixture  # noqa: F401
from .albums import Album, app_of, sent, sha256_of
from .conftest import client_of, problem


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="sun.png"', "sun.png"),
        ("attachment; filename=sun.png", "sun.png"),
        ("ATTACHMENT ; FileName = sun.png", "sun.png"),
        ('inline; filename="a\\"b.png"', 'a"b.png'),
        ("attachment; filename=\"plain\"; filename*=UTF-8''na%C3%AFve%20%E5%AD%97.png", "na\u00efve \u5b57.png"),
        ("attachment; filename*=utf-8'en'x.png; filename=y", "x.png"),
        ('attachment; filename="na\u00c3\u00afve"', "na\u00efve"),
        ('attachment; filename="na\u00efve"', "na\u00efve"),
        ("attachment; filename*=UTF-8''photo%20(1)%20it's*.png", "photo (1) it's*.png"),
        ("attachment; filename=photo(1).png; size=3", "photo(1).png"),
        ("attachment; filename=na\u00efve", "na\u00efve"),
        ("attachment", ""),
        ('attachment; filename=""', ""),
        ('attachment; size=3; filename="x;y=z.png";', "x;y=z.png"),
    ],
)
async def test_the_name_comes_from_content_disposition(api, disposition, name):
    header = (b"content-disposition", disposition.encode("latin-1"))
    answer = await api.post("/album/blobs", content=b"x", headers=[header])
    assert (answer.status_code, answer.json().get("name")) == (201, name)


@pytest.mark.parametrize(
    "disposition",
    [
        *('attachment; filename="a/b"', 'attachment; filename="..\\\\b"', "attachment; filename=.."),
        *("attachment; filename*=UTF-8''%2Fetc%2Fpasswd", "attachment; filename*=UTF-8''a%0Ab"),
        *("attachment; filename*=UTF-8''cod%E2%80%AEgnp.exe", f'attachment; filename="{"x" * 10240}"'),
    ],
)
async def test_a_hostile_name_is_refused(api, disposition):
    answer = await api.post("/album/blobs", content=b"x", headers={"content-disposition": disposition})
    assert [error["pointer"] for error in problem(answer, 422, "invalid-data")["errors"]] == ["/name"]


@pytest.mark.parametrize(
    "disposition",
    [
        *('attachment; filename="x', "attachment; filename", "attachment filename=x; =y", "a; filename=x; filename=y"),
        *("attachment; filename*=UTF-8''%FF", "attachment; filename*=UTF-16''x", "attachment; filename*=x"),
        *("attachment; filename*=UTF-8''%zz", 'attachment; filename="a"b'),
        *('filename="x"', 'filename="x"; size=3', '; filename="x"', "filename*=UTF-8''x"),
    ],
)
async def test_a_content_disposition_that_is_not_valid_is_refused(api, disposition):
    answer = await api.post("/album/blobs", content=b"x", headers={"content-disposition": disposition})
    problem(answer, 400, "invalid-upload")


@pytest.mark.parametrize("content_type", ["text", "image/png\tx", "*/*", "a/b;", "image/" + "x" * 300, "a/b; c=\u00e4"])
async def test_a_content_type_that_is_none_is_refused(api, content_type):
    header = (b"content-type", content_type.encode("latin-1"))
    answer = await api.post("/album/blobs", content=b"x", headers=[header])
    assert [error["pointer"] for error in problem(answer, 422, "invalid-data")["errors"]] == ["/content_type"]


def digest(content: bytes, algorithm: str = "sha-256") -> str:
    return f"{algorithm}=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@pytest.mark.parametrize("header", ["content-digest", "repr-digest"])
async def test_an_announced_hash_is_compared(api, crud, header):
    assert (await api.post("/album/blobs", content=b"x", headers={header: digest(b"x")})).status_code == 201
    several = f"sha-512=:AAAA:, {digest(b'x')}, md5=:AAAA:"
    assert (await api.post("/album/blobs", content=b"x", headers={header: several})).status_code == 201
    problem(await api.post("/album/blobs", content=b"y", headers={header: digest(b"x")}), 422, "digest-mismatch")
    assert await crud.resource_manager(Album).storage.blobs.rows([sha256_of(b"y")]) == []
    for bad in ("", "sha-256=x", "sha-256=:AAAA:", "sha-512=:AAAA:", "sha-256=:" + "!" * 44 + ":"):
        answer = await api.post("/album/blobs", content=b"x", headers={header: bad})
        problem(answer, 400, "invalid-condition")
    both = {"content-digest": digest(b"x"), "repr-digest": digest(b"y")}
    problem(await api.post("/album/blobs", content=b"x", headers=both), 400, "invalid-condition")


async def test_a_form_with_one_file_is_an_upload(api):
    answer = await api.post("/album/blobs", files={"file": ("na\u00efve.png", CONTENT, "image/png")})
    assert answer.json() == {
        "sha256": sha256_of(CONTENT),
        "size": len(CONTENT),
        "content_type": "image/png",
        "name": "na\u00efve.png",
    }
    answer = await api.post("/album/blobs", data={"sha256": sha256_of(b"x")}, files={"file": ("x", b"x")})
    assert answer.status_code == 201
    answer = await api.post("/album/blobs", data={"sha256": sha256_of(b"y")}, files={"file": ("x", b"x")})
    problem(answer, 422, "digest-mismatch")
    answer = await api.post("/album/blobs", data={"sha256": "zzz"}, files={"file": ("x", b"x")})
    assert problem(answer, 422, "invalid-data")["errors"][0]["pointer"] == "/sha256"


async def test_the_digest_of_a_form_covers_the_whole_body(api):
    request = api.build_request("POST", "/album/blobs", files={"file": ("x", b"content")})
    body = b"".join(list(request.stream))
    for content, status in ((body, 201), (body.replace(b"content", b"another"), 422)):
        headers = {"content-type": request.headers["content-type"], "content-digest": digest(body)}
        assert (await api.post("/album/blobs", content=content, headers=headers)).status_code == status


FORM = {"content-type": "multipart/form-data; boundary=b"}
FILE = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x.txt"\r\nContent-Type: text/plain\r\n\r\n'


async def test_bytes_that_look_like_a_boundary_belong_to_the_file(api):
    content = b"\r\n--\r\n--a\r\n--\r\n\r\n-b--b\n--b\r\r\n--\r\n-" * 5000
    answer = await api.post("/album/blobs", content=FILE + content + b"\r\n--b--\r\n", headers=FORM)
    assert answer.json()["sha256"] == sha256_of(content)
    quoted = {"content-type": 'Multipart/Form-Data; charset=utf-8; boundary="b"'}
    padded = FILE.replace(b"--b\r\n", b"--b \t\r\n") + b"x\r\n--b-- ignored"
    assert (await api.post("/album/blobs", content=padded, headers=quoted)).json()["size"] == 1


@pytest.mark.parametrize("size", [0, 1, 60_000, 131_071, 131_072, 300_000])
async def test_a_boundary_is_found_in_a_body_that_is_cut_anywhere(api, size):
    content = b"x" * size
    body = FILE + content + b"\r\n--b--"

    async def in_pieces(step: int):
        for at in range(0, len(body), step):
            yield body[at : at + step]

    for step in (7, 1000, 131_072) if size < 100_000 else (4099, 131_072, 131_073):
        answer = await api.post("/album/blobs", content=in_pieces(step), headers=FORM)
        assert answer.json()["sha256"] == sha256_of(content), answer.text


NO_FILE = b'--b\r\nContent-Disposition: form-data; name="f"'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"--b--\r\n",
        FILE,
        FILE + b"x",
        FILE + b"x\r\n--b",
        FILE + b"x\r\n--b\r\n",
        FILE + b"x\r\n" + FILE + b"y\r\n--b--",
        FILE + b"x\r\n--bc\r\n--b--",
        FILE + b"x\r\n--b--" + b"z" * 2000,
        NO_FILE + b"\r\n\r\nx\r\n--b--",
        NO_FILE + b'; filename=""\r\n\r\n\r\n--b--',
        FILE + b"x\r\n" + NO_FILE + b"\r\n\r\nx\r\n--b--",
        b"--b\r\n\r\nx\r\n--b--",
        b"--b\r\nContent-Disposition: attachment; filename=x\r\n\r\nx\r\n--b--",
        b"--b\r\nnonsense\r\n\r\nx\r\n--b--",
        FILE.replace(b"\r\n\r\n", b"\r\nContent-Type: a/b\r\n\r\n") + b"x\r\n--b--",
        FILE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n") + b"x\r\n--b--",
        FILE.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 20_000 + b"\r\n\r\n") + b"x\r\n--b--",
        b"--c\r\n" + FILE,
        b"--b" + b" " * 5000 + b"\r\n" + FILE,
        NO_FILE.replace(b'"f"', b'"sha256"') + b"\r\n\r\n" + b"a" * 5000 + b"\r\n" + FILE + b"x\r\n--b--",
    ],
)
async def test_a_form_that_is_not_valid_is_refused_and_nothing_is_stored(api, crud, body):
    problem(await api.post("/album/blobs", content=body, headers=FORM), 400, "invalid-upload")
    usage = await crud.resource_manager(Album).storage.meta_store.blob_usage()
    assert usage.blobs == 0


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", f"; boundary={'x' * 71}", '; boundary="\u00e4"', "; boundary=a b"]
)
async def test_a_form_needs_a_boundary(api, boundary):
    header = (b"content-type", f"multipart/form-data{boundary}".encode("latin-1"))
    problem(await api.post("/album/blobs", content=FILE, headers=[header]), 400, "invalid-upload")


async def test_hostile_names_in_forms_are_refused(api):
    for name in ("../x", "C:\\x", "x" * 300, "a\u202eb"):
        answer = await api.post("/album/blobs", files={"file": (name, b"x")})
        assert problem(answer, 422, "invalid-data")["errors"][0]["pointer"] == "/name"
    answer = await api.post("/album/blobs", files={"file": ("x", b"x", "no type")})
    assert problem(answer, 422, "invalid-data")["errors"][0]["pointer"] == "/content_type"


async def test_a_file_may_not_be_larger_than_the_limit():
    app, crud = app_of(max_blob=1000, max_body=100)
    async with client_of(app) as api:
        await sent(api, b"x" * 1000)

        async def chunked(size: int):
            for _ in range(size):
                yield b"x"

        for content in (b"x" * 1001, chunked(1001)):
            found = problem(await api.post("/album/blobs", content=content), 413, "blob-too-large")
            assert "1000 bytes" in found["detail"]
        assert (await api.post("/album/blobs", files={"file": ("x", b"x" * 1000)})).status_code == 201
        for size in (1001, 200_000):
            problem(await api.post("/album/blobs", files={"file": ("x", b"x" * size)}), 413, "blob-too-large")
        usage = await crud.resource_manager(Album).storage.meta_store.blob_usage()
        assert usage == (2, 2000)


async def test_the_files_of_a_model_may_not_exceed_its_quota():
    app, crud = app_of(blob_quota=1000)
    crud.resource_manager(Album)
    async with client_of(app) as api:
        await sent(api, b"x" * 900)
        problem(await api.post("/album/blobs", content=b"y" * 101), 413, "blob-quota-exceeded")
        await sent(api, b"y" * 100)
        usage = await crud.resource_manager(Album).storage.meta_store.blob_usage()
        assert usage == (2, 1000)


async def test_limits_of_a_model_take_precedence():
    class Other(Struct):
        file: Blob

    crud = AutoCRUD(max_blob=10, blob_quota=20)
    manager = crud.add_model(Other, max_blob=5, blob_quota=7)
    assert manager.blob_limits == (5, 7)
    assert crud.add_model(Album).blob_limits == (10, 20)


@pytest.mark.parametrize("last", [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}])
async def test_a_body_that_is_shorter_than_its_length_stores_nothing(crud_and_app, last):
    """Some servers do not compare the length. There is no answer, because the connection is gone."""
    crud, app = crud_and_app
    messages = iter([{"type": "http.request", "body": b"x" * 10, "more_body": True}, last])
    answers = []

    async def receive():
        return next(messages)

    async def send(message):
        answers.append(message)

    headers = [(b"host", b"test"), (b"content-length", b"12")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": "/album/blobs", "raw_path": b"/album/blobs", "query_string": b"", "root_path": ""}
    await app(scope | {"headers": headers, "client": ("test", 1), "server": ("test", 80)}, receive, send)
    assert answers == []
    assert (await crud.resource_manager(Album).storage.meta_store.blob_usage()).blobs == 0


async def test_an_encoded_body_is_refused(api):
    answer = await api.post("/album/blobs", content=b"x", headers={"content-encoding": "gzip"})
    problem(answer, 415, "unsupported-media-type")


async def test_an_idempotency_key_is_ignored(api):
    """A repeated upload is a blob of its own, and changes nothing else."""
    for content in (b"x" * 10, b"y" * 10):
        ref = await sent(api, content, **{"idempotency-key": "k"})
        assert ref["sha256"] == sha256_of(content)


async def test_a_query_is_refused(api):
    problem(await api.post("/album/blobs?name=x", content=b"x"), 400, "invalid-query")
    problem(await api.get(f"/album/x/blobs/{'a' * 64}?fields=x"), 400, "invalid-query")
