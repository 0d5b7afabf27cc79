"""Downloads over HTTP: headers, conditions and ranges."""

from __future__ import annotations

import pytest

from app.autocrud.resource_manager.model.blob import name_error
from app.autocrud.resource_manager.model.blob_references import BlobFinder
from app.autocrud.resource_manager.model.codec import Codec
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests.backup.imports import KINDS, Place

from .album_fixtures import CONTENT, PNG, album_fixture, api_fixture, crud_and_app_fixture, crud_fixture  # noqa: F401
from .albums import Album, app_of, sent
from .conftest import MERGE, client_of, problem


async def test_a_download_has_the_content_and_its_headers(api, album):
    path, cover = album
    answer = await api.get(f"{path}/blobs/{cover['sha256']}")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert {name: value for name, value in answer.headers.items() if name != "date"} == {
        "etag": f'"{cover["sha256"]}"',
        "cache-control": "private, immutable, max-age=31536000",
        "vary": "authorization",
        "content-disposition": 'inline; filename="sun.png"',
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
        "content-type": "image/png",
        "content-length": str(len(CONTENT)),
    }
    head = await api.head(f"{path}/blobs/{cover['sha256']}")
    assert (head.status_code, head.content, head.headers) == (200, b"", answer.headers)


async def test_an_empty_file_can_be_read(api):
    ref = await sent(api, b"")
    path = (await api.post("/album", json={"title": "x", "cover": ref})).headers["location"]
    for headers in ({}, {"range": "bytes=0-"}):
        answer = await api.get(f"{path}/blobs/{ref['sha256']}", headers=headers)
        assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


@pytest.mark.parametrize(
    ("content_type", "name", "shown_type", "disposition"),
    [
        ("image/svg+xml", "x.svg", "application/octet-stream", 'attachment; filename="x.svg"'),
        ("text/html", "x.html", "application/octet-stream", 'attachment; filename="x.html"'),
        ("application/pdf", "x.pdf", "application/octet-stream", 'attachment; filename="x.pdf"'),
        ("text/javascript", "", "application/octet-stream", "attachment"),
        ("text/plain; charset=utf-8", "x.txt", "text/plain; charset=utf-8", 'inline; filename="x.txt"'),
        ("IMAGE/PNG", "x", "IMAGE/PNG", 'inline; filename="x"'),
        ("image/png", 'a"b%c.png', "image/png", "inline; filename=\"a_b_c.png\"; filename*=UTF-8''a%22b%25c.png"),
        (
            "video/mp4",
            "na\u00efve \u5b57.mp4",
            "video/mp4",
            "inline; filename=\"na_ve _.mp4\"; filename*=UTF-8''na%C3%AFve%20%E5%AD%97.mp4",
        ),
    ],
)
async def test_only_harmless_types_are_shown(api, content_type, name, shown_type, disposition):
    ref = await sent(api, b"<script>", **{"content-type": content_type})
    made = await api.post("/album", json={"title": "x", "cover": ref | {"name": name}})
    answer = await api.get(f"{made.headers['location']}/blobs/{ref['sha256']}")
    assert answer.headers["content-type"] == shown_type
    assert answer.headers["content-disposition"] == disposition


@pytest.fixture(name="unchecked")
def unchecked_fixture(monkeypatch):
    """Store references as they are, as an import of an earlier program did."""
    monkeypatch.setattr(Codec, "with_sizes", lambda _, model_data, __: model_data)
    monkeypatch.setattr(BlobFinder, "check", lambda *_: None)


async def check_size(factory: IStorageFactory, size: dict[str, int]) -> None:
    """Assert that a download has the size of the stored file, if the data has another size or none."""
    app, crud = app_of(storage_factory=factory)
    async with client_of(app) as api:
        sha256 = (await sent(api, CONTENT))["sha256"]
        made = await api.post("/album", json={"title": "x", "cover": {"sha256": sha256, **size}})
        assert made.json()["data"]["cover"]["size"] == size.get("size", 0)
        url = f"{made.headers['location']}/blobs/{sha256}?redirect=false"
        answer = await api.get(url)
        assert (answer.status_code, answer.content) == (200, CONTENT)
        assert answer.headers["content-length"] == str(len(CONTENT))
        assert (await api.head(url)).headers["content-length"] == str(len(CONTENT))
        for header, content in (("bytes=-3", CONTENT[-3:]), ("bytes=2-", CONTENT[2:]), ("bytes=0-99999", CONTENT)):
            part = await api.get(url, headers={"range": header})
            assert (part.status_code, part.content) == (206, content)
            assert part.headers["content-range"].endswith(f"/{len(CONTENT)}")
        several = await api.get(url, headers={"range": "bytes=0-1,-2"})
        assert f"/{len(CONTENT)}\r\n".encode() in several.content
        beyond = await api.get(url, headers={"range": f"bytes={len(CONTENT)}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
    await crud.close()


WRONG_SIZES: list[dict[str, int]] = [{}, {"size": 0}, {"size": 5}, {"size": 10**9}]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", WRONG_SIZES)
@pytest.mark.parametrize("kind", ["memory", "disk", "memory-disk", "s3-sqlite", "memory-s3", "cached-s3"])
async def test_the_size_is_that_of_the_stored_file(kind, size, tmp_path):
    await check_size(KINDS[kind](Place(tmp_path)), size)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["postgres-disk", "redis-disk", "redis-postgres"])
async def test_the_size_is_that_of_the_stored_file_on_servers(kind, tmp_path, postgres, valkey):
    for number, size in enumerate(WRONG_SIZES):
        await check_size(KINDS[kind](Place(tmp_path / str(number), postgres, valkey)), size)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "content_type", "shown_type", "disposition"),
    [
        ("../../x", "image/png", "image/png", 'inline; filename="x"'),
        ("C:\\temp\\x.png", "image/png", "image/png", 'inline; filename="x.png"'),
        ("..", "image/png", "image/png", "inline"),
        ("a\r\nset-cookie: x=1", "image/png", "image/png", 'inline; filename="a__set-cookie: x=1"'),
        ("\u202egpj.exe", "image/png", "image/png", 'inline; filename="_gpj.exe"'),
        ("x" * 10_000 + ".png", "image/png", "image/png", f'inline; filename="{"x" * 251}.png"'),
        ("x", "image/png; " + "a" * 20_000, "application/octet-stream", 'attachment; filename="x"'),
        ("x", "text/plain;\r\nx-evil: 1", "application/octet-stream", 'attachment; filename="x"'),
        ("x", "text/plain; \u5b57", "application/octet-stream", 'attachment; filename="x"'),
    ],
)
async def test_names_and_types_that_no_upload_may_have_are_not_sent(
    crud, api, name, content_type, shown_type, disposition
):
    ref = await sent(api, CONTENT)
    made = await api.post("/album", json={"title": "x", "cover": ref | {"name": name, "content_type": content_type}})
    answer = await api.get(f"{made.headers['location']}/blobs/{ref['sha256']}")
    assert answer.headers["content-type"] == shown_type
    assert answer.headers["content-disposition"] == disposition
    assert {"set-cookie", "x-evil"}.isdisjoint(answer.headers)
    stored = await crud.resource_manager(Album).blob(made.json()["meta"]["resource_id"], ref["sha256"])
    assert name_error(stored.blob.name) is None


async def test_a_file_whose_row_is_missing_is_damage(crud, api, album, monkeypatch):
    path, cover = album
    manager = crud.resource_manager(Album)

    async def no_rows(_):
        return []

    monkeypatch.setattr(manager.storage.blobs, "rows", no_rows)
    answer = await api.get(f"{path}/blobs/{cover['sha256']}")
    assert (
        "is not among the files of the store; restore it from a backup"
        in problem(answer, 503, "store-damaged")["detail"]
    )


async def test_the_first_reference_gives_name_and_type(api):
    ref = await sent(api, CONTENT)
    one, two, three = (ref | {"name": name, "content_type": "image/png"} for name in ("1", "2", "3"))
    path = (await api.post("/album", json={"title": "x", "photos": [two, three]})).headers["location"]
    url = f"{path}/blobs/{ref['sha256']}"
    assert (await api.get(url)).headers["content-disposition"] == 'inline; filename="2"'
    await api.patch(path, json={"cover": one}, headers=MERGE)
    assert (await api.get(url)).headers["content-disposition"] == 'inline; filename="1"'
    assert (await api.get(f"{url}?revision=1")).headers["content-disposition"] == 'inline; filename="2"'


async def test_hashes_that_the_resource_does_not_have(api, album):
    path, _ = album
    other = await sent(api, b"other")
    for unknown in (other["sha256"], "f" * 64):
        problem(await api.get(f"{path}/blobs/{unknown}"), 404, "blob-not-found")
    for nonsense in ("x", "F" * 64, "a" * 63, f"{'a' * 64}/1", ""):
        problem(await api.get(f"{path}/blobs/{nonsense}"), 404, "no-such-route")
    problem(await api.get(f"/album/none/blobs/{other['sha256']}"), 404, "not-found")
    problem(await api.get(f"{path}/blobs/{other['sha256']}?revision=9"), 404, "revision-not-found")
    answer = await api.put(f"{path}/blobs/{other['sha256']}", content=b"x")
    assert problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD"


async def test_conditional_requests(api, album):
    path, cover = album
    url, tag = f"{path}/blobs/{cover['sha256']}", f'"{cover["sha256"]}"'
    for header in (tag, "*", f'"x", W/{tag}'):
        answer = await api.get(url, headers={"if-none-match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert answer.headers["cache-control"] == "private, immutable, max-age=31536000"
    assert (await api.get(url, headers={"if-none-match": '"x"'})).status_code == 200
    for header in (tag, "*", f'"x", {tag}'):
        assert (await api.get(url, headers={"if-match": header})).status_code == 200
    for header in ('"x"', f"W/{tag}"):
        problem(await api.get(url, headers={"if-match": header}), 412, "precondition-failed")
    problem(await api.get(url, headers={"if-match": "x"}), 400, "invalid-condition")


def parts_of(answer) -> list[tuple[str, bytes]]:
    """Return the Content-Range and the content of each part of an answer with several ranges."""
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    assert len(answer.content) == int(answer.headers["content-length"])
    first, *parts, last = answer.content.split(f"\r\n--{boundary}".encode())
    assert (first, last) == (b"", b"--\r\n")
    found = []
    for part in parts:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        assert headers["content-type"] == "image/png"
        found.append((headers["content-range"], content))
    return found


SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=100-", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes=9-{SIZE * 2}", 9, SIZE),
        ("Bytes=1-2", 1, 3),
        (f"bytes=5-9,{SIZE}-", 5, 10),
        ("bytes=5-9, 8-20", 5, 21),
        ("bytes=5-9,10-20", 5, 21),
        ("bytes=0-,5-9", 0, SIZE),
        ("bytes=0-99999999999999999999", 0, SIZE),
        ("bytes=-99999999999999999999", 0, SIZE),
        (f"bytes=3-{'9' * 5000}", 3, SIZE),
        (f"bytes={'0' * 5000}3-5", 3, 6),
        ("bytes=,4-5, ,", 4, 6),
    ],
)
async def test_a_range_is_sent_alone(api, album, header, start, end):
    path, cover = album
    answer = await api.get(f"{path}/blobs/{cover['sha256']}", headers={"range": header})
    assert (answer.status_code, answer.content) == (206, CONTENT[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert answer.headers["content-type"] == "image/png"
    head = await api.head(f"{path}/blobs/{cover['sha256']}", headers={"range": header})
    assert (head.status_code, head.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes= , ",
        "bytes=x",
        "bytes=5-4",
        "items=0-1",
        "bytes=1-2,x",
        "bytes=--1",
        "bytes=1-2-3",
        "0-1",
    ],
)
async def test_a_range_that_is_not_valid_is_ignored(api, album, header):
    path, cover = album
    answer = await api.get(f"{path}/blobs/{cover['sha256']}", headers={"range": header})
    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_several_ranges_are_parts_of_one_answer(api, album):
    path, cover = album
    url = f"{path}/blobs/{cover['sha256']}"
    answer = await api.get(url, headers={"range": "bytes=100-199,0-9,-1"})
    assert answer.status_code == 206
    assert parts_of(answer) == [
        (f"bytes 100-199/{SIZE}", CONTENT[100:200]),
        (f"bytes 0-9/{SIZE}", CONTENT[:10]),
        (f"bytes {SIZE - 1}-{SIZE - 1}/{SIZE}", CONTENT[-1:]),
    ]
    joined = await api.get(url, headers={"range": "bytes=100-199,150-250,0-9"})
    assert [found for found, _ in parts_of(joined)] == [f"bytes 0-9/{SIZE}", f"bytes 100-250/{SIZE}"]
    empty = await api.get(url, headers={"range": "bytes=0-0,,2-2"})  # RFC 9110, 5.6.1
    assert [found for found, _ in parts_of(empty)] == [f"bytes 0-0/{SIZE}", f"bytes 2-2/{SIZE}"]
    most = ",,".join(f"{at * 10}-{at * 10 + 1}" for at in range(16))
    assert len(parts_of(await api.get(url, headers={"range": f"bytes={most}"}))) == 16


@pytest.mark.parametrize(
    "header", [f"bytes={SIZE}-", f"bytes={'9' * 5000}-", "bytes=-0", "bytes=" + ",".join(["0-0"] * 17)]
)
async def test_ranges_that_cannot_be_sent_are_refused(api, album, header):
    path, cover = album
    answer = await api.get(f"{path}/blobs/{cover['sha256']}", headers={"range": header})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_a_range_depends_on_if_range(api, album):
    path, cover = album
    url, tag = f"{path}/blobs/{cover['sha256']}", f'"{cover["sha256"]}"'
    for condition, status in ((tag, 206), ('"x"', 200), (f"W/{tag}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)):
        answer = await api.get(url, headers={"range": "bytes=0-1", "if-range": condition})
        assert answer.status_code == status, condition
