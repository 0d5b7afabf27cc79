"""Files through `crudstack serve` over raw sockets and curl: hostile uploads and downloads, and constant memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.autocrud.http.transfers import MAX_DOWNLOADS, MAX_UPLOADS_OF_CALLER
from tests.conftest import Server
from tests.raw_connections import HANGS_S, HOST, MB, connected, ended, next_answer, resident

CONTENT = bytes(range(256)) * 400
UPLOAD = b"POST /album/blobs HTTP/1.1\r\n" + HOST


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def start(serve: Callable[..., Server], data_dir: Path) -> Callable[..., Server]:
    """Start a server with albums. Callers are named by their tokens if `callers` is given."""

    def start(*, callers: str = "", storage: str = "disk", **more) -> Server:
        environment = {"ALBUM_CALLERS": callers, **more.pop("environment", {})}
        return serve(storage, data_dir, module="tests.http.album_server", environment=environment, **more)

    return start


@pytest.fixture
def served(start) -> Server:
    return start()


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Let the process of the tests open a few thousand connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def contents(data_dir: Path) -> list[str]:
    """Return the names of all files of blobs, also of uploads in progress."""
    return [path.name for path in data_dir.rglob("blobs/**/*") if path.is_file()]


def upload(served: Server, content: bytes, **headers: str) -> dict:
    answer = httpx.post(f"{served.url}/album/blobs", content=content, headers=headers, timeout=HANGS_S)
    assert answer.status_code == 201, answer.text
    return answer.json()


def album(served: Server, ref: dict, **headers: str) -> str:
    """Create an album with this cover, and return the URL of the file."""
    answer = httpx.post(f"{served.url}/album", json={"title": "x", "cover": ref}, headers=headers)
    assert answer.status_code == 201, answer.text
    return f"{served.url}{answer.headers['location']}/blobs/{ref['sha256']}"


async def gone(data_dir: Path) -> None:
    """Wait until no file of an upload is left."""
    async with asyncio.timeout(HANGS_S):
        while contents(data_dir):
            await asyncio.sleep(0.02)


def open_files(served: Server) -> list[str]:
    """Return the names of the sockets and files of blobs that the server has open."""
    found = []
    for link in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = str(link.readlink())
            if name.startswith("socket:") or "/blobs/" in name:
                found.append(name)
    return found


async def released(before: list[str], served: Server) -> None:
    """Wait until the server has no more sockets and files of blobs open than before."""
    async with asyncio.timeout(HANGS_S):
        while len(open_files(served)) > len(before):
            await asyncio.sleep(0.05)


# Uploads that end too early, or never


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize(
    "begins",
    [
        b"Content-Length: 5000000\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n100000\r\n",
        (
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000000\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="f"; filename="x"\r\n\r\n'
        ),
    ],
    ids=["length", "chunked", "form"],
)
async def test_a_connection_that_is_cut_stores_nothing(served, data_dir, begins, how):
    before = open_files(served)
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + begins + b"x" * 600_000)
        await writer.drain()
        async with asyncio.timeout(HANGS_S):
            while not contents(data_dir):  # the upload has begun
                await asyncio.sleep(0.02)
        if how == "half-closed":
            writer.write_eof()
            async with asyncio.timeout(HANGS_S):
                assert b"201" not in await reader.read()
        elif how == "closed":
            writer.close()
        else:
            writer.transport.abort()
    await gone(data_dir)
    await released(before, served)
    assert upload(served, CONTENT)["size"] == len(CONTENT)


async def test_a_length_that_is_too_small_ends_the_file_there(served):
    """HTTP has no other meaning: the rest is another request. An announced hash shows the mistake."""
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Content-Length: 10\r\n\r\n" + b"0123456789abcdef")
        stored = await next_answer(reader)
        assert json.loads(stored.body)["size"] == 10
        assert (await next_answer(reader)).status == 400
    announced = base64.b64encode(hashlib.sha256(b"0123456789abcdef").digest())
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Content-Digest: sha-256=:%b:\r\nContent-Length: 10\r\n\r\n0123456789" % announced)
        assert (await next_answer(reader)).type == "digest-mismatch"


async def test_a_file_that_is_too_large_is_refused_before_it_is_sent(start, data_dir):
    served = start(environment={"CRUDSTACK_MAX_BLOB_MB": "1", "CRUDSTACK_BLOB_QUOTA_MB": "1"})
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MB + 1))
        answer = await next_answer(reader)
        assert (answer.status, answer.type, answer.headers["connection"]) == (413, "blob-too-large", "close")
    async with connected(served) as (reader, writer):  # without a length, it is refused when it is too large
        writer.write(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = asyncio.create_task(next_answer(reader))
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
                if answer.done():
                    break
        assert (await answer).type == "blob-too-large"
    await gone(data_dir)
    assert upload(served, b"x" * MB)["size"] == MB
    answer = httpx.post(f"{served.url}/album/blobs", content=b"y")
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:crudstack:blob-quota-exceeded")


async def test_a_thousand_uploads_that_never_end_stop_no_other_client(served, data_dir):
    """They wait in the middle of a body. Other requests are answered while they wait, and so are other uploads."""
    httpx.get(f"{served.url}/album")
    before, open_before = resident(served), open_files(served)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(1000):
            _, writer = await stack.enter_async_context(connected(served))
            writer.write(UPLOAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1000)
        await asyncio.sleep(0.5)
        async with httpx.AsyncClient(base_url=served.url, timeout=HANGS_S) as client:
            for number in range(50):
                assert (await client.post("/album", json={"title": str(number)})).status_code == 201
                assert (await client.get("/album?limit=1")).status_code == 200
            assert len(open_files(served)) > len(open_before) + MAX_UPLOADS_OF_CALLER, "no upload had to end for this"
            statuses = []
            for _ in range(100):
                answer = await client.post("/album/blobs", content=CONTENT)
                statuses.append(answer.status_code)
                if answer.status_code == 201:
                    break
                assert answer.json()["type"] == "urn:crudstack:too-many-uploads"
                assert answer.headers["retry-after"] == "1"
                await asyncio.sleep(0.1)
            assert statuses[-1] == 201  # it took the place of one that does nothing
        assert len(contents(data_dir)) < 200
        assert resident(served) - before < 64 * MB


async def test_one_caller_has_a_bounded_number_of_uploads(start):
    """The uploads of one caller go on, so none of them is replaced. Another caller has a limit of its own."""
    served = start(callers="alice,bob")
    stop = asyncio.Event()

    async def endless(token: str) -> int:
        async with connected(served) as (reader, writer):
            writer.write(UPLOAD + f"Authorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            answer = asyncio.create_task(next_answer(reader))
            while not stop.is_set() and not answer.done():
                writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                await asyncio.sleep(0.2)
            if not answer.done():
                writer.write(b"0\r\n\r\n")
            found = await answer
            return found.status if found.status == 201 else (found.status, found.type)

    running = [asyncio.create_task(endless("alice")) for _ in range(20)]
    await asyncio.sleep(3)  # longer than a client must do nothing until it is replaced
    assert upload(served, b"x", authorization="Bearer bob")["size"] == 1
    refused = httpx.post(f"{served.url}/album/blobs", content=b"x", headers={"authorization": "Bearer alice"})
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:crudstack:too-many-uploads")
    stop.set()
    statuses = await asyncio.gather(*running)
    assert statuses.count(201) == 16
    assert statuses.count((429, "too-many-uploads")) == 4


async def test_uploads_do_not_count_as_bodies_in_memory(served):
    """Four clients stop after 30 MB each. Together that is more than bodies in memory may have."""
    before = resident(served)
    async with contextlib.AsyncExitStack() as stack:
        writers = []
        for _ in range(4):
            reader, writer = await stack.enter_async_context(connected(served))
            writers.append((reader, writer))
            writer.write(UPLOAD + b"Content-Length: %d\r\n\r\n" % (31 * MB))
            for _ in range(30):
                writer.write(b"x" * MB)
                await writer.drain()
        assert resident(served) - before < 32 * MB
        for reader, writer in writers:
            writer.write(b"y" * MB)
            assert (await next_answer(reader)).status == 201


async def test_an_upload_in_many_chunks_is_received(served):
    """More chunks than other bodies may have, if they are not tiny."""
    content = b"x" * 1500
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(80):
            writer.write((b"5dc\r\n" + content + b"\r\n") * 500)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        answer = await next_answer(reader)
        assert json.loads(answer.body)["size"] == 40_000 * 1500
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = asyncio.create_task(next_answer(reader))
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(b"1\r\nx\r\n" * 500)
                await writer.drain()
                await asyncio.sleep(0)
                if answer.done():
                    break
        assert (await answer).type == "malformed-request"


async def test_a_slow_upload_that_goes_on_is_received(served):
    """It takes longer than other bodies may pause, and its client pauses less than an upload may."""
    async with connected(served) as (reader, writer):
        writer.write(UPLOAD + b"Content-Length: 100010\r\n\r\n" + b"x" * 100_000)
        await asyncio.sleep(14)
        writer.write(b"y" * 10)
        assert (await next_answer(reader)).status == 201


# Names and types


@pytest.mark.parametrize(
    ("argument", "status"),
    [
        ("file=@{path};filename=sun.png;type=image/png", 201),
        ("file=@{path};filename=na\u00efve \u5b57.png", 201),
        ("file=@{path};filename=../../etc/passwd", 422),
        ("file=@{path};filename=a\u202egnp.exe", 422),
        ("file=@{path};filename={long}", 422),
        ("file=@{path};type=*/*", 422),
        ("file=text", 400),
    ],
)
def test_curl_sends_forms(served, tmp_path, argument, status):
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    form = argument.format(path=path, long="x" * 10_000)
    command = ["curl", "-s", "-w", "\n%{http_code}", "-F", form, f"{served.url}/album/blobs"]
    body, _, code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    assert (int(code), json.loads(body).get("sha256")) == (
        status,
        hashlib.sha256(CONTENT).hexdigest() if status == 201 else None,
    )


def test_curl_sends_and_reads_files(served, tmp_path):
    (tmp_path / "content").write_bytes(CONTENT)
    sent = ["curl", "-s", "-T", tmp_path / "content", "-X", "POST", f"{served.url}/album/blobs"]
    ref = json.loads(subprocess.run(sent, capture_output=True, check=True).stdout)
    url = album(served, ref)
    read = subprocess.run(["curl", "-s", "-r", "100-199,5000-", url], capture_output=True, check=True).stdout
    assert CONTENT[100:200] in read
    assert CONTENT[5000:] in read
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    resumed = ["curl", "-s", "-C", "-", "-o", tmp_path / "part", url]
    subprocess.run(resumed, capture_output=True, check=True)
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_the_hash_of_anothers_file_is_like_an_unknown_one(start):
    served = start(callers="alice,eve")
    alice, eve = {"authorization": "Bearer alice"}, {"authorization": "Bearer eve"}
    ref = upload(served, CONTENT, **alice)
    url = album(served, ref, **alice)
    answers = [
        httpx.post(f"{served.url}/album", json={"title": "x", "cover": ref | {"sha256": sha256}}, headers=eve)
        for sha256 in (ref["sha256"], "0" * 64)
    ]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].content == answers[1].content
    assert httpx.get(url, headers=eve).status_code == 404
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers=alice).content == CONTENT
    again = upload(served, CONTENT, **eve)
    assert again == ref
    assert httpx.get(album(served, again, **eve), headers=eve).content == CONTENT


# Downloads


def request_of(url: str) -> bytes:
    path = url.removeprefix("http://").partition("/")[2]
    return f"GET /{path} HTTP/1.1\r\n".encode() + HOST + b"\r\n"


async def test_downloads_that_are_not_read_stop_no_other_client(served):
    """Hundreds of clients ask for a large file and read nothing. Memory is bounded, and other downloads succeed."""
    ref = upload(served, b"x" * (24 * MB))
    url = album(served, ref)
    assert httpx.get(url).headers["content-length"] == str(24 * MB)
    before, open_before = resident(served), open_files(served)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(400):
            _, writer = await stack.enter_async_context(connected(served))
            writer.write(request_of(url))
        await asyncio.sleep(2.5)
        async with httpx.AsyncClient(timeout=HANGS_S) as client:
            assert (await client.get(f"{served.url}/album?limit=1")).status_code == 200
            assert len(open_files(served)) >= len(open_before) + MAX_DOWNLOADS, "no download had to end for this"
            async with asyncio.timeout(HANGS_S):
                while (answer := await client.get(url)).status_code == 503:  # the last one is not stalled yet
                    await asyncio.sleep(0.5)
            assert len(answer.content) == 24 * MB
        assert resident(served) - before < 128 * MB
    await released(open_before, served)


async def test_a_download_whose_client_waits_gives_its_connection_to_a_new_one(start):
    """The server may open few files. Downloads that nothing is read of are closed if there is no other connection."""
    served = start(max_files=256)
    url = album(served, upload(served, b"x" * (24 * MB)))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            for _ in range(40):
                _, writer = await stack.enter_async_context(connected(served))
                writer.write(request_of(url))
            await asyncio.sleep(0.3)
            assert httpx.get(f"{served.url}/healthz", timeout=HANGS_S).status_code == 200
            assert httpx.post(f"{served.url}/album", json={"title": "x"}, timeout=HANGS_S).status_code == 201


async def test_a_client_that_leaves_a_download_releases_everything(served):
    """Its file is closed, and is not read to its end."""
    url = album(served, upload(served, b"x" * (100 * MB)))
    before, read_before = open_files(served), bytes_read(served)
    for _ in range(20):
        async with connected(served) as (reader, writer):
            writer.write(request_of(url))
            async with asyncio.timeout(HANGS_S):
                await reader.readexactly(100_000)
    await released(before, served)
    assert bytes_read(served) - read_before < 20 * 50 * MB


def bytes_read(served: Server) -> int:
    """Return how many bytes the server has read from files and sockets since its start."""
    line = Path(f"/proc/{served.process.pid}/io").read_text().splitlines()[0]
    return int(line.removeprefix("rchar: "))


async def test_ctrl_c_does_not_wait_for_a_download(served):
    url = album(served, upload(served, b"x" * (24 * MB)))
    async with connected(served) as (reader, writer):
        writer.write(request_of(url))
        async with asyncio.timeout(HANGS_S):
            await reader.readexactly(100_000)
        await asyncio.to_thread(served.stop)  # it fails if the server waits


async def test_a_file_that_is_lost_is_an_error_and_no_empty_answer(served, data_dir):
    ref = upload(served, CONTENT)
    url = album(served, ref)
    (path,) = [path for path in data_dir.rglob(f"blobs/**/{ref['sha256']}/*") if path.is_file()]
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(httpx.RemoteProtocolError, match="received 102399 bytes, expected 102400"):
        httpx.get(url)
    path.unlink()
    answer = httpx.get(url)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:crudstack:store-damaged")
    assert str(data_dir) not in answer.text


async def test_several_requests_on_one_connection(served):
    """A download leaves the connection in a state in which the next request is read."""
    url = album(served, upload(served, CONTENT))
    async with connected(served) as (reader, writer):
        for _ in range(3):
            writer.write(request_of(url) * 2 + UPLOAD + b"Content-Length: 3\r\n\r\nabc")
            for _ in range(2):
                answer = await next_answer(reader)
                assert (answer.status, answer.body) == (200, CONTENT)
            assert (await next_answer(reader)).status == 201
        writer.write_eof()
        await ended(reader)


# Memory


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_files(served, tmp_path):
    """256 MB up, twice, and down, once in ranges, with far less memory than that."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        for number in range(256):
            file.write(bytes([number]) * MB)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    httpx.get(f"{served.url}/album")
    idle, most, done = resident(served), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, resident(served))

    watching = threading.Thread(target=watch)
    watching.start()
    url = f"{served.url}/album/blobs"
    raw = subprocess.run(["curl", "-s", "-X", "POST", "-T", path, url], capture_output=True, check=True).stdout
    form = subprocess.run(["curl", "-s", "-F", f"file=@{path}", url], capture_output=True, check=True).stdout
    assert json.loads(raw)["sha256"] == json.loads(form)["sha256"] == digest
    file_url = album(served, json.loads(raw))
    subprocess.run(["curl", "-s", "-o", tmp_path / "back", file_url], check=True)
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == digest
    ranges = ["curl", "-s", "-o", "/dev/null", "-r", f"0-{100 * MB},{150 * MB}-", file_url]
    subprocess.run(ranges, check=True)
    done.set()
    watching.join()
    assert most - idle < 50 * MB
