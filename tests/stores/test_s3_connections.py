"""Connections to S3 that are dropped silently, at any moment, and answers that refuse a time or credentials."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.core import MAX_BODY
from app.autocrud.errors import OutcomeUnknown, StoreUnavailable
from app.autocrud.resource_manager.backends.s3 import clients as s3_clients
from app.autocrud.resource_manager.backends.s3 import credentials as s3_credentials
from app.autocrud.resource_manager.backends.s3.object_store import UNCHANGED, NotStored, S3ObjectStore, Stored, Unknown
from app.autocrud.resource_manager.runtime.moments import Moment
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests.services import BUCKET
from tests.silent_s3 import HALF, SILENT, Request, SilentS3
from tests.tcp_proxy import TcpProxy

REAL, REAL_RETRY_S = s3_clients.WAITS_S, s3_clients.RETRY_S
WAITS = {"swap": (0.5, 0.8, 1.2), "small": (0.5, 0.6, 0.8), "large": (0.6, 0.6, 0.8), "file": (1, 1)}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Use a tenth of the real waiting times. The tests count attempts and measure no times."""
    monkeypatch.setattr(s3_clients, "WAITS_S", WAITS)
    monkeypatch.setattr(s3_clients, "RETRY_S", 0.2)
    monkeypatch.setattr(s3_clients, "RENEW_PAUSE_S", 0.01)
    monkeypatch.setattr(s3_clients, "CONFLICT_PAUSE_S", 0.01)


@pytest.fixture
def server():
    with SilentS3() as server:
        yield server


@pytest.fixture
def store(server) -> S3ObjectStore:
    return S3ObjectStore("b", server.url, "key", "secret", "us-east-1")


def first(count: int, what: str, method: str | None = None):
    """Return a plan for `SilentS3`: the first requests (of a method) end with these results."""
    left = [what] * count
    return lambda request: left.pop() if left and method in (None, request.method) else None


def drop_open(server: SilentS3) -> list[Request]:
    """Drop all open connections. Return a list of the requests that are lost on them from now on."""
    newest, lost = server.connections, []

    def plan(request: Request) -> str | None:
        if request.connection > newest:
            return None
        lost.append(request)
        return SILENT

    server.plan = plan
    return lost


async def test_one_request_pays_for_all_connections_that_were_dropped(server, store):
    """Invariant C1. Without it, each retry and each later request could use the next dead connection."""
    server.objects["k"] = b"body"
    await asyncio.gather(*(store.get("k") for _ in range(10)))
    assert server.connections > 3
    lost = drop_open(server)
    assert (await store.get("k")).body == b"body"
    assert len(lost) == 1
    for _ in range(20):
        assert (await store.get("k")).body == b"body"
    assert len(lost) == 1


async def test_requests_at_the_same_time_each_lose_at_most_one_attempt(server, store):
    server.objects["k"] = b"body"
    await asyncio.gather(*(store.get("k") for _ in range(10)))
    lost = drop_open(server)
    bodies = await asyncio.gather(*(store.get("k") for _ in range(10)))
    assert {found.body for found in bodies} == {b"body"}
    assert len(lost) <= 10


async def listed(store: S3ObjectStore, prefix: str = "") -> list[str]:
    return [one.key async for one in store.list(prefix)]


REQUESTS = {
    "get": lambda store: store.get("k"),
    "get_if_changed": lambda store: store.get_if_changed("k", '"other"'),
    "get_range": lambda store: store.get_range("k", 1, 3),
    "put": lambda store: store.put("k", b"body"),
    "put of megabytes": lambda store: store.put("large", b"x" * 1_000_000),
    "delete": lambda store: store.delete(["k"]),
    "list": listed,
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_without_an_answer_is_repeated_on_a_new_connection(server, store, name, count):
    """This includes connections that were never used: the first ones of a process may be dropped too."""
    server.objects["k"] = b"body"
    expected = await REQUESTS[name](store)
    server.objects["k"] = b"body"
    server.requests.clear()
    server.plan = first(count, SILENT)
    assert await REQUESTS[name](store) == expected
    assert len(server.requests) == count + 1
    assert len({request.connection for request in server.requests}) == count + 1


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_storage_is_unavailable_after_all_attempts(server, store, name):
    server.plan = lambda _: SILENT
    with pytest.raises(StoreUnavailable, match="nothing was changed"):
        await REQUESTS[name](store)
    assert len(server.requests) == 3


@pytest.mark.parametrize("count", [1, 2])
async def test_half_a_body_is_read_again(server, store, count):
    server.objects["k"] = os.urandom(300_000)
    server.plan = first(count, HALF)
    assert (await store.get("k")).body == server.objects["k"]
    assert len(server.requests) == count + 1


async def test_answers_without_an_object_are_not_repeated(server, store):
    """404, 304 and 412 are answers: the request is not repeated, and the connection stays in use."""
    server.objects["k"] = b"body"
    etag = (await store.get("k")).etag
    assert await store.get("nothing") is None
    assert await store.get_if_changed("k", etag) is UNCHANGED
    assert await store.put_if("k", b"new", '"other"') == NotStored()
    assert len(server.requests) == 4
    assert server.connections == 2  # conditional PUTs have connections of their own


async def test_only_obstore_repeats_errors_of_the_server(server, store):
    server.plan = lambda _: "503 SlowDown"
    with pytest.raises(StoreUnavailable):
        await store.get("k")
    assert len(server.requests) <= s3_clients.RETRIES + 1


async def test_only_obstore_repeats_refused_connections(monkeypatch):
    attempts = []
    repeat = s3_clients.Clients.may_repeat

    async def counted(*given):
        attempts.append(given)
        return await repeat(*given)

    monkeypatch.setattr(s3_clients.Clients, "may_repeat", counted)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StoreUnavailable):
        await S3ObjectStore("b", f"http://127.0.0.1:{port}", "key", "secret", "us-east-1").get("k")
    assert len(attempts) == 1


# Conditional PUTs


async def test_a_conditional_put_without_an_answer_is_unknown_and_sent_once(server, store):
    server.plan = first(1, SILENT)
    assert isinstance(await store.put_if("k", b"body", None), Unknown)
    assert len(server.requests) == 1
    assert server.objects["k"] == b"body"  # the PUT took effect
    assert await store.put_if("k", b"other", None) == NotStored()
    assert server.requests[1].connection != server.requests[0].connection


async def test_conditional_puts_wait_longer_after_one_had_no_answer(server, store, monkeypatch):
    server.plan = first(4, SILENT)
    loop = asyncio.get_running_loop()
    waits = []
    for _ in range(4):
        began = loop.time()
        assert isinstance(await store.put_if("k", b"body", None), Unknown)
        waits.append(loop.time() - began)
    assert [wait >= least for wait, least in zip(waits, (*WAITS["swap"], WAITS["swap"][-1]), strict=True)] == [True] * 4
    assert isinstance(await store.put_if("new", b"body", None), Stored)
    monkeypatch.setattr(s3_clients, "WAITS_S", WAITS | {"swap": (0.5, 600, 600)})
    server.plan = first(1, SILENT)
    async with asyncio.timeout(60):  # after an answer the first wait is the short one again
        assert isinstance(await store.put_if("k", b"body", None), Unknown)


@pytest.mark.parametrize("code", sorted(s3_clients.RENEWABLE))
async def test_a_conditional_put_that_was_refused_for_its_clock_or_credentials_is_sent_again(server, store, code):
    server.plan = first(1, f"403 {code}")
    assert isinstance(await store.put_if("k", b"body", None), Stored)
    assert len(server.requests) == 2


async def test_a_conditional_put_is_sent_again_once_only(server, store):
    server.plan = lambda _: "403 RequestTimeTooSkewed"
    assert isinstance(await store.put_if("k", b"body", None), Unknown)
    assert len(server.requests) == 2


@pytest.mark.parametrize("answer", ["403 AccessDenied", "403 SignatureDoesNotMatch", "500 InternalError", "400 Other"])
async def test_a_conditional_put_is_not_sent_again_after_any_other_answer(server, store, answer):
    server.plan = lambda _: answer
    assert isinstance(await store.put_if("k", b"body", None), Unknown)
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", ["409 OperationAborted", "409 ExistingObjectIsDirectory"])
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_that_met_another_one_in_progress_is_repeated(server, store, name, answer):
    """Versitygw answers it to a PUT if another one creates the same directory."""
    server.objects["k"] = b"body"
    expected = await REQUESTS[name](store)
    server.objects["k"] = b"body"
    server.plan = first(2, answer)
    assert await REQUESTS[name](store) == expected
    server.requests.clear()
    server.plan = lambda _: answer
    with pytest.raises(StoreUnavailable):
        await REQUESTS[name](store)
    assert len(server.requests) == 3


# Clocks and credentials


@pytest.mark.parametrize("answer", ["403 RequestTimeTooSkewed", "400 ExpiredToken", "403 RequestExpired"])
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_with_a_refused_clock_or_token_is_repeated_once(server, store, name, answer):
    server.objects["k"] = b"body"
    expected = await REQUESTS[name](store)
    server.objects["k"] = b"body"
    server.requests.clear()
    server.plan = first(1, answer)
    assert await REQUESTS[name](store) == expected
    assert len(server.requests) == 2
    server.requests.clear()
    server.plan = lambda _: answer
    with pytest.raises(StoreUnavailable):
        await REQUESTS[name](store)
    assert len(server.requests) == 2


@pytest.mark.parametrize("answers", [(SILENT, "400 ExpiredToken"), ("400 ExpiredToken", SILENT)])
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_dropped_connection_and_an_expired_token_come_together(server, store, name, answers):
    """Both happen after a long freeze."""
    server.objects["k"] = b"body"
    expected = await REQUESTS[name](store)
    server.objects["k"] = b"body"
    server.requests.clear()
    left = list(answers)
    server.plan = lambda _: left.pop(0) if left else None
    assert await REQUESTS[name](store) == expected
    assert len(server.requests) == 3


async def test_the_provider_is_called_again_after_an_expired_token(server, monkeypatch):
    calls = []

    class Provider:
        def __call__(self):
            calls.append("call")
            return {
                "access_key_id": "key",
                "secret_access_key": "secret",
                "token": f"token-{len(calls)}",
                "expires_at": None,
            }

        def forget(self):
            calls.append("forget")

    monkeypatch.setattr(s3_credentials, "provider", Provider)
    store = S3ObjectStore("b", server.url, region_name="us-east-1")
    server.objects["k"] = b"body"
    await store.get("k")
    assert calls == ["call"]
    server.plan = lambda one: "400 ExpiredToken" if one.headers["x-amz-security-token"] == "token-1" else None
    assert (await store.get("k")).body == b"body"
    assert calls == ["call", "forget", "call"]
    assert isinstance(await store.put_if("new", b"body", None), Stored)
    assert calls == ["call", "forget", "call"], "clients that are made later share what was fetched"


async def test_new_connections_do_not_fetch_new_credentials(server, monkeypatch):
    calls = []

    def provide():
        calls.append("call")
        return {"access_key_id": "key", "secret_access_key": "secret", "token": None, "expires_at": None}

    monkeypatch.setattr(s3_credentials, "provider", lambda: provide)
    store = S3ObjectStore("b", server.url, region_name="us-east-1")
    server.objects["k"] = b"body"
    await store.get("k")
    drop_open(server)
    await store.get("k")
    assert calls == ["call"]


# After a pause


@pytest.mark.parametrize(("running", "wall"), [(61.0, 0.0), (0.0, 61.0), (0.0, -61.0)])
async def test_connections_that_were_idle_are_not_used(server, store, running, wall):
    """Either clock suffices: a freeze may stop the monotonic clock, and the wall clock is set after it."""
    server.objects["k"] = b"body"
    await store.get("k")
    lost = drop_open(server)
    used = store._clients._used
    store._clients._used = Moment(used.running - running, used.wall - wall)
    assert (await store.get("k")).body == b"body"
    assert lost == []


async def test_a_connection_that_was_idle_is_not_used_although_others_were(server, monkeypatch):
    monkeypatch.setattr(s3_clients, "IDLE_S", 0.5)
    store = S3ObjectStore("b", server.url, "key", "secret", "us-east-1")

    async def both() -> None:
        server.before_answer = threading.Barrier(2, timeout=30).wait  # so each has a connection of its own
        await asyncio.gather(store.get("k"), store.get("k"))
        server.before_answer = lambda: None

    await both()
    assert server.connections == 2
    for _ in range(10):
        await asyncio.sleep(0.1)
        await store.get("k")
    assert server.connections == 2
    await both()
    assert server.connections == 3


async def test_connections_in_use_are_kept(server, store):
    server.objects["k"] = b"body"
    for _ in range(20):
        await store.get("k")
    assert server.connections == 1


# Lists and files


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
async def test_a_list_continues_after_a_dropped_connection(server, store, lost):
    server.objects.update({f"p/{number:04}": b"" for number in range(3500)})
    server.plan = lambda _: SILENT if len(server.requests) == lost else None
    assert await listed(store, "p/") == [f"p/{number:04}" for number in range(3500)]
    assert len(server.requests) == 5


async def test_a_download_continues_after_a_dropped_connection(server, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_clients, "WAITS_S", WAITS | {"small": (2, 2, 2)})  # a busy machine hashes 40 MB first
    store = S3ObjectStore("b", server.url, "key", "secret", "us-east-1")
    server.objects["file"] = os.urandom(40 * 1024 * 1024)
    server.plan = lambda _: HALF if len(server.requests) <= 3 else None
    assert await store.download("file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.objects["file"]
    starts = [int(one.headers.get("range", "bytes=0-")[6:].partition("-")[0]) for one in server.requests]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert starts[1] >= 16 * 1024 * 1024
    assert {one.headers.get("if-match") for one in server.requests[1:]} == {(await store.get("file")).etag}


async def test_a_download_never_mixes_two_versions_of_an_object(server, store, tmp_path):
    server.objects["file"] = os.urandom(20 * 1024 * 1024)

    def plan(_: Request) -> str | None:
        if len(server.requests) == 1:
            return HALF
        server.objects["file"] = b"new"
        return None

    server.plan = plan
    with pytest.raises(StoreUnavailable):
        await store.download("file", tmp_path / "file")


async def test_an_upload_is_repeated(server, store, tmp_path):
    (tmp_path / "file").write_bytes(content := os.urandom(1_000_000))
    server.plan = first(2, SILENT)
    await store.upload("file", tmp_path / "file")
    assert server.objects["file"] == content
    assert len(server.requests) == 3


# Everything together


class Note(Struct):
    text: str


async def test_connections_dropped_at_any_moment_lose_nothing_and_answer(ministack_s3, tmp_path, monkeypatch):
    """The network drops all connections again and again while several clients write."""
    monkeypatch.setattr(s3_clients, "WAITS_S", WAITS | {"swap": (1, 1.5, 2), "small": (1, 1.5, 2)})
    rng = random.Random(18)
    with TcpProxy(ministack_s3.url) as proxy:
        objects = S3ObjectStore(
            BUCKET, proxy.url, ministack_s3.access_key_id, ministack_s3.secret_access_key, "us-east-1"
        )
        factory = S3StorageFactory(BUCKET, prefix=f"{tmp_path.name}/", object_store=objects, sync_interval=None)
        manager = AutoCRUD(storage_factory=factory).add_model(Note, indexed_fields=["text"])
        await manager.count()  # the first start makes the race check, which does not tolerate drops
        ended = asyncio.Event()
        acknowledged: dict[str, set[str]] = {}

        async def writes(at: int) -> None:
            rid, possible = f"note{at}", {"0"}
            await manager.create(Note("0"), resource_id=rid)
            number = 0
            while not ended.is_set():
                number += 1
                try:
                    await manager.update(rid, Note(f"{number}"))
                    possible = {f"{number}"}
                except OutcomeUnknown:
                    possible.add(f"{number}")
                found = (await manager.get(rid)).data.text
                assert found in possible
                possible = {found}
            acknowledged[rid] = possible

        async def drops() -> None:
            for _ in range(6):
                # A request survives two drops but not three, because it has three attempts within 4.5 s.
                await asyncio.sleep(2.3 + rng.random() / 2)
                proxy.swallow()
            await asyncio.sleep(0.5)
            ended.set()

        async with asyncio.timeout(120):
            await asyncio.gather(drops(), *(writes(at) for at in range(4)))
        other = AutoCRUD(
            storage_factory=S3StorageFactory(
                BUCKET, prefix=f"{tmp_path.name}/", object_store=ministack_s3.object_store(), sync_interval=None
            )
        ).add_model(Note, indexed_fields=["text"])
        for rid, possible in acknowledged.items():
            assert (await other.get(rid)).data.text in possible
        await manager.storage.close()
        await other.storage.close()


def test_a_request_fits_into_the_time_of_a_function():
    """The bound that docs/lambda.md names, for the real waits."""
    assert sum(REAL["small"]) + REAL_RETRY_S <= 20
    assert sum(REAL["large"]) + REAL_RETRY_S <= 28
    assert REAL["large"][-1] * 3.5e6 / 8 >= MAX_BODY, "slow networks send the largest body in the last attempt"
    assert all(min(wait) > REAL_RETRY_S for wait in REAL.values()), "obstore would repeat what had no answer (C4)"
