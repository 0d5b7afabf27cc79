"""Direct transfers: uploads by presigned URLs that become blobs, on good servers and on ones that check nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import httpx
import pytest

from app.autocrud.errors import (
    BlobQuotaExceeded,
    DigestMismatch,
    OutcomeUnknown,
    StoreUnavailable,
    TooManyUploads,
    UploadIncomplete,
    UploadNotFound,
)
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3.object_store import ObjectStore
from app.autocrud.resource_manager.basic import BlobRow, MetaStore, ModelSpec, owner_of
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.blob_store.simple import MemoryBlobStore
from app.autocrud.resource_manager.contract.direct import (
    KEEP_STAGING_S,
    MAX_OPEN,
    RESERVED,
    URL_LIFE_S,
    Announced,
    PresignedUpload,
    without_reservations,
)
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.storage.direct_s3 import S3DirectTransfer, direct_transfer
from app.autocrud.resource_manager.storage.stores_by_name import StoresByName
from tests.s3_servers.install import SERVERS
from tests.s3_servers.servers import running
from tests.services import BUCKET, create_bucket

SPEC = ModelSpec("picture")
BODY = b"the content of a file" * 100
ENDED_S = URL_LIFE_S + KEEP_STAGING_S
OF_FIXTURES = ["ministack", "seaweed"]


class Place(NamedTuple):
    """A model with direct transfers."""

    transfer: S3DirectTransfer
    rows: MetaStore
    blobs: S3BlobStore
    objects: ObjectStore

    async def send(self, upload: PresignedUpload, body: bytes = BODY) -> int:
        """Send content as a client does, and return the status of the answer."""
        if isinstance(self.objects, MemoryObjectStore):
            return (await self.objects.use("PUT", upload.url, body, upload.headers)).status
        async with httpx.AsyncClient() as client:
            return (await client.put(upload.url, content=body, headers=upload.headers)).status_code

    async def content(self, key: str) -> bytes:
        return b"".join([chunk async for chunk in self.blobs.read(key)])

    async def names(self, what: str) -> set[str]:
        """Return the names of the objects below `blobs/` of the model, of staging ("uploads/") or of blobs ("")."""
        found = [one.key.removeprefix(self.blobs.prefix) async for one in self.objects.list(self.blobs.prefix)]
        staged = {name for name in found if name.startswith("uploads/")}
        return staged - {"uploads/now"} if what else set(found) - staged - {"now"}


def place(objects: ObjectStore, rows: MetaStore | None = None) -> Place:
    rows = rows or MemoryMetaStore()
    blobs = S3BlobStore("bucket", f"{uuid.uuid4().hex}/blobs/", object_store=objects)
    rows.bind(SPEC)
    blobs.bind(SPEC)
    transfer = direct_transfer(blobs, rows)
    assert isinstance(transfer, S3DirectTransfer)
    return Place(transfer, rows, blobs, objects)


def announced(body: bytes = BODY, **changes: object) -> Announced:
    given = {
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "content_type": "image/png",
        "name": "a.png",
    }
    return Announced(**given | changes)


ROWS = ["s3-sqlite", "postgres", "redis", "redis-postgres"]
"""The MetaStores that keep the rows on servers."""


def rows_of(name: str, objects: ObjectStore, request: pytest.FixtureRequest) -> MetaStore:
    """Return a new MetaStore by its name in settings."""
    place = {"prefix": f"{uuid.uuid4().hex}/", "bucket": "bucket", "object_store": objects}
    if "postgres" in name:
        place["pg_dsn"] = request.getfixturevalue("postgres")
    if "redis" in name:
        place["redis_url"] = request.getfixturevalue("valkey")
    return StoresByName(name, "s3", **place).meta_store("picture")


@pytest.fixture(params=["memory", "memory without checksums", *(f"memory with {rows}" for rows in ROWS), *OF_FIXTURES])
async def here(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    name = request.param
    if not name.startswith("memory"):
        yield place(request.getfixturevalue(f"{name}_s3").object_store())
        return
    objects = MemoryObjectStore()
    objects.keeps_checksums = "without" not in name
    _, _, of_rows = name.partition(" with ")
    rows = rows_of(of_rows, objects, request) if of_rows else None
    yield place(objects, rows)
    if rows is not None:
        await rows.close()


async def test_an_upload_becomes_a_blob(here: Place):
    upload = await here.transfer.begin("ann", announced())
    assert upload.expires - datetime.now(UTC) > timedelta(minutes=59)
    assert await here.transfer.completed(upload.id, "ann") is None
    assert await here.send(upload) == 200
    done = await here.transfer.complete(upload.id, "ann")
    assert done.announced == announced()
    assert (done.row.size, done.row.sha256) == (len(BODY), announced().sha256)
    assert await here.content(done.row.key) == BODY
    assert await here.rows.blobs([announced().sha256]) == [done.row]
    assert await here.rows.blob_usage() == (1, len(BODY))
    assert await here.transfer.completed(upload.id, "ann") == done


async def test_a_completion_is_idempotent(here: Place):
    upload = await here.transfer.begin("ann", announced())
    await here.send(upload)
    first = await here.transfer.complete(upload.id, "ann")
    assert await here.transfer.complete(upload.id, "ann") == first
    assert await here.rows.blob_usage() == (1, len(BODY))
    assert len(await here.names("")) == 1


async def test_concurrent_completions_give_the_same_reference(here: Place):
    upload = await here.transfer.begin("ann", announced())
    await here.send(upload)
    done = await asyncio.gather(*(here.transfer.complete(upload.id, "ann") for _ in range(4)))
    assert {one.row.sha256 for one in done} == {announced().sha256}
    for one in done:
        assert await here.content(one.row.key) == BODY
    assert await here.rows.blobs([RESERVED]) == []


async def test_a_url_that_is_used_again_changes_nothing(here: Place):
    upload = await here.transfer.begin("ann", announced())
    await here.send(upload)
    done = await here.transfer.complete(upload.id, "ann")
    blobs = await here.names("")
    await here.send(upload)
    await here.send(upload, b"evil content".ljust(len(BODY)))
    assert await here.content(done.row.key) == BODY
    assert await here.transfer.complete(upload.id, "ann") == done
    assert await here.names("") == blobs


async def test_wrong_content_is_refused_and_can_be_sent_again(here: Place):
    upload = await here.transfer.begin("ann", announced())
    sent = await here.send(upload, b"evil content".ljust(len(BODY)))
    with pytest.raises((DigestMismatch, UploadIncomplete)) as refused:
        await here.transfer.complete(upload.id, "ann")
    assert isinstance(refused.value, DigestMismatch if sent == 200 else UploadIncomplete)
    assert await here.names("") == set()
    assert await here.rows.blob_usage() == (1, len(BODY)), "it is still reserved"
    assert await here.send(upload) == 200
    assert await here.content((await here.transfer.complete(upload.id, "ann")).row.key) == BODY


async def test_an_empty_file(here: Place):
    upload = await here.transfer.begin("ann", announced(b""))
    assert await here.send(upload, b"") == 200
    assert await here.content((await here.transfer.complete(upload.id, "ann")).row.key) == b""


@pytest.mark.parametrize("name", ["ministack", *SERVERS])
async def test_no_server_makes_a_blob_of_wrong_content_or_changes_one(name, request: pytest.FixtureRequest, tmp_path):
    """Some servers refuse wrong content, others store it: then the copy is read back."""
    if name == "ministack":
        await refuse_wrong_content(place(request.getfixturevalue("ministack_s3").object_store()))
        return
    with running(name, tmp_path) as server:
        create_bucket(BUCKET, server.s3)
        await refuse_wrong_content(place(server.s3.object_store()))


async def refuse_wrong_content(here: Place) -> None:
    for wrong in (b"evil content".ljust(len(BODY)), BODY[:-1], BODY + b"!"):
        upload = await here.transfer.begin("ann", announced())
        await here.send(upload, wrong)
        with pytest.raises((DigestMismatch, UploadIncomplete)):
            await here.transfer.complete(upload.id, "ann")
        assert await here.names("") == set()
    assert await here.send(upload) == 200
    done = await here.transfer.complete(upload.id, "ann")
    for again in (BODY, b"evil content".ljust(len(BODY)), b""):  # the URL is used again
        await here.send(upload, again)
        assert await here.content(done.row.key) == BODY
        assert await here.transfer.complete(upload.id, "ann") == done


@pytest.mark.parametrize("checks_copies", [True, False])
@pytest.mark.parametrize("keeps_checksums", [True, False])
async def test_content_that_is_replaced_during_the_completion_never_becomes_a_blob(keeps_checksums, checks_copies):
    """The client sends other content at any moment, as far as the server lets it."""
    for moment in range(12):
        objects = MemoryObjectStore()
        objects.keeps_checksums, objects.checks_copies = keeps_checksums, checks_copies
        here = place(objects)
        upload = await here.transfer.begin("ann", announced())
        await here.send(upload)
        asked = 0

        def replace(_: Call, here: Place = here, upload: str = upload.id, moment: int = moment) -> InjectedFault | None:
            nonlocal asked
            asked += 1
            if asked == moment and not here.objects.keeps_checksums:
                here.objects._store(f"{here.blobs.prefix}uploads/{upload}", b"evil content".ljust(len(BODY)))
            return None

        objects.fault = replace
        try:
            done = await here.transfer.complete(upload.id, "ann")
        except DigestMismatch:
            assert await here.names("") == set()
        else:
            assert await here.content(done.row.key) == BODY


async def test_uploads_of_others_cannot_be_completed(here: Place):
    upload = await here.transfer.begin("ann", announced())
    await here.send(upload)
    for name, caller in ((upload.id, "bob"), ("0" * 20, "ann"), ("../x", "ann"), ("", "ann"), ("now", "ann")):
        with pytest.raises(UploadNotFound):
            await here.transfer.complete(name, caller)
        with pytest.raises(UploadNotFound):
            await here.transfer.completed(name, caller)


async def test_nothing_was_sent(here: Place):
    upload = await here.transfer.begin("ann", announced())
    with pytest.raises(UploadIncomplete, match="send the content to the URL"):
        await here.transfer.complete(upload.id, "ann")


async def test_uploads_reserve_the_quota(here: Place):
    quota = 2 * len(BODY) + 5
    first = await here.transfer.begin("ann", announced(), quota=quota)
    await here.transfer.begin("bob", announced(), quota=quota)
    before = await here.names("uploads/")
    with pytest.raises(BlobQuotaExceeded):
        await here.transfer.begin("cleo", announced(), quota=quota)
    assert await here.names("uploads/") == before
    await here.send(first)
    await here.transfer.complete(first.id, "ann")
    assert await here.rows.blob_usage() == (2, 2 * len(BODY))


async def test_a_reservation_is_no_blob(here: Place):
    await here.transfer.begin("ann", announced())
    rows = await here.rows.blobs([RESERVED, announced().sha256])
    assert [row.size for row in rows] == [len(BODY)]
    assert without_reservations(rows) == []


async def test_a_caller_has_a_limit_of_open_uploads():
    here = place(MemoryObjectStore())
    uploads = [await here.transfer.begin("ann", announced()) for _ in range(MAX_OPEN)]
    with pytest.raises(TooManyUploads, match="complete them"):
        await here.transfer.begin("ann", announced())
    await here.transfer.begin("bob", announced())
    await here.send(uploads[0])
    await here.transfer.complete(uploads[0].id, "ann")
    await here.transfer.begin("ann", announced())


def at(here: Place, seconds: float) -> None:
    """Set the clock of the server. `seconds` after the start of the test."""
    start = datetime(2030, 1, 1, tzinfo=UTC)
    here.objects.clock = lambda: start + timedelta(seconds=seconds)


async def test_uploads_expire_by_the_dates_of_the_server():
    here = place(MemoryObjectStore())
    at(here, 0)
    completed = await here.transfer.begin("ann", announced(), quota=3 * len(BODY))
    await here.send(completed)
    done = await here.transfer.complete(completed.id, "ann")
    sent = await here.transfer.begin("ann", announced())
    at(here, URL_LIFE_S - 1)
    await here.send(sent)
    at(here, ENDED_S - 1)
    young = await here.transfer.begin("ann", announced())
    await here.transfer.expire()
    assert len(await here.names("uploads/")) == 5
    at(here, ENDED_S)
    await here.transfer.expire()
    assert await here.names("uploads/") == {f"uploads/{young.id}.json"}
    assert await here.rows.blob_usage() == (2, 2 * len(BODY))
    for upload in (completed, sent):
        with pytest.raises(UploadNotFound):
            await here.transfer.complete(upload.id, "ann")
    assert await here.content(done.row.key) == BODY


async def test_content_that_arrives_after_the_end_is_removed_later():
    here = place(MemoryObjectStore())
    at(here, 0)
    upload = await here.transfer.begin("ann", announced())
    at(here, ENDED_S)
    await here.transfer.expire()
    here.objects._store(f"{here.blobs.prefix}uploads/{upload.id}", BODY)  # a transfer that began in time
    await here.transfer.expire()
    assert await here.names("uploads/") == {f"uploads/{upload.id}"}
    at(here, 2 * ENDED_S)
    await here.transfer.expire()
    assert await here.names("uploads/") == set()


async def test_a_reservation_without_a_marker_expires():
    here = place(MemoryObjectStore())
    at(here, 0)
    upload = await here.transfer.begin("ann", announced())
    await here.objects.delete([f"{here.blobs.prefix}uploads/{upload.id}.json"])
    await here.transfer.expire()
    with pytest.raises(UploadNotFound):
        await here.transfer.complete(upload.id, "ann")
    at(here, ENDED_S)
    await here.transfer.expire()
    assert await here.rows.blob_usage() == (0, 0)
    assert await here.names("uploads/") == set()


@pytest.mark.parametrize("name", ROWS)
async def test_every_store_keeps_reservations_and_removes_them(name, request: pytest.FixtureRequest):
    """A reservation takes quota from all uploads until it expires."""
    objects = MemoryObjectStore()
    rows = rows_of(name, objects, request)
    here = place(objects, rows)
    at(here, 0)
    quota = 2 * len(BODY)
    open_, done = [await here.transfer.begin("ann", announced(), quota=quota) for _ in range(2)]
    await here.send(done)
    completed = await here.transfer.complete(done.id, "ann")
    with pytest.raises(BlobQuotaExceeded):
        await rows.add_blob(BlobRow(key=f"{'a' * 64}/0-{'b' * 32}", size=1, owner="x"), quota=quota)
    with pytest.raises(BlobQuotaExceeded):
        await here.transfer.begin("bob", announced(b"x"), quota=quota)
    reserved = await rows.blobs([RESERVED])
    assert [(row.size, row.owner) for row in reserved] == [(len(BODY), owner_of("ann"))]
    at(here, ENDED_S)
    await here.transfer.expire()
    assert await rows.blobs([RESERVED, announced().sha256]) == [completed.row]
    assert await rows.blob_usage() == (1, len(BODY))
    await here.transfer.begin("bob", announced(), quota=quota)
    with pytest.raises(UploadNotFound):
        await here.transfer.complete(open_.id, "ann")
    await rows.close()


async def test_an_expiry_without_uploads_takes_one_request():
    here = place(MemoryObjectStore())
    await here.transfer.expire()
    assert here.objects.requests == {"list": 1}


async def test_a_raised_epoch_makes_the_completion_copy_again():
    """Invariant F2: content without a row may be swept, after the epoch was raised."""
    here = place(MemoryObjectStore())
    upload = await here.transfer.begin("ann", announced())
    await here.send(upload)
    raised = False

    def raise_epoch(call: Call) -> InjectedFault | None:
        nonlocal raised
        if call.op == "copy" and not raised:
            raised = True
            other = f"{'a' * 64}/0-{'b' * 32}"
            asyncio.get_running_loop().create_task(here.rows.remove_blobs([other]))
        return None

    here.objects.fault = raise_epoch
    here.objects.latency = lambda _: 0.01
    done = await here.transfer.complete(upload.id, "ann")
    assert await here.rows.blob_epoch() == 1
    assert done.row.key.partition("/")[2].startswith("1-")
    assert await here.content(done.row.key) == BODY
    assert len(await here.names("")) == 1


@pytest.mark.parametrize("fault", [DROPPED, LOST_ANSWER])
@pytest.mark.parametrize("keeps_checksums", [True, False])
async def test_a_failure_of_any_request_loses_nothing(keeps_checksums, fault):
    """The client repeats what failed. Afterwards the blob is there, the quota is right, and staging is emptied."""
    for number in range(1, 100):
        objects = MemoryObjectStore()
        objects.keeps_checksums = keeps_checksums
        rows = S3SqliteMetaStore("bucket", "meta.sqlite", object_store=objects)
        here = place(objects, rows)
        at(here, 0)
        await rows.blob_epoch()  # creates the store, after many races
        asked = 0

        def fail(_: Call, number: int = number) -> InjectedFault | None:
            nonlocal asked
            asked += 1
            return fault if asked == number else None

        objects.fault = fail
        upload = await repeated(lambda here=here: here.transfer.begin("ann", announced()))
        while await repeated(lambda here=here, upload=upload: here.send(upload)) != 200:
            pass
        done = await repeated(lambda here=here, upload=upload: here.transfer.complete(upload.id, "ann"))
        for ended in (ENDED_S, 2 * ENDED_S):
            at(here, ended)
            await repeated(here.transfer.expire)
        objects.fault = lambda _: None
        assert await here.content(done.row.key) == BODY
        assert await here.names("uploads/") == set()
        assert await rows.blobs([RESERVED]) == []
        with_rows = {row.key for row in await rows.blobs([announced().sha256])}
        assert done.row.key in with_rows
        for key in with_rows:
            assert await here.content(key) == BODY
        at(here, 2 * ENDED_S + 24 * 3600)
        orphans = await here.names("") - with_rows
        assert orphans <= set(await here.blobs.older_than(24 * 3600)), "the sweep of blobs finds them"
        await rows.close()
        if asked < number:
            return
    raise AssertionError("there are more requests than numbers")


async def repeated(work: Callable[[], object]) -> object:
    for _ in range(5):
        try:
            return await work()
        except (StoreUnavailable, OutcomeUnknown):
            continue
    raise AssertionError("it fails again and again")


async def test_a_download_has_the_given_type_and_name(here: Place):
    body = os.urandom(2000)
    upload = await here.transfer.begin("ann", announced(body))
    await here.send(upload, body)
    done = await here.transfer.complete(upload.id, "ann")
    download = await here.transfer.download(done.row.key, content_type="image/png", disposition='inline; filename="a"')
    assert download.expires > datetime.now(UTC) + timedelta(minutes=59)
    if isinstance(here.objects, MemoryObjectStore):
        assert (await here.objects.use("GET", download.url)).body == body
        return
    async with httpx.AsyncClient() as client:
        answer = await client.get(download.url)
    assert answer.content == body
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'inline; filename="a"'


def test_direct_transfers_need_blobs_on_s3():
    assert direct_transfer(None, MemoryMetaStore()) is None
    assert direct_transfer(MemoryBlobStore(), MemoryMetaStore()) is None
