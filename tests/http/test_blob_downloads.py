"""Downloads over HTTP: headers, conditions and ranges."""

from __future__ import annotations

import pytest

from .album_fixtures import CONTENT, PNG, album_fixture, api_fixture, crud_and_app_fixture, crud_fixture  # noqa: F401
from .albums import sent
from .conftest import MERGE, problem


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
