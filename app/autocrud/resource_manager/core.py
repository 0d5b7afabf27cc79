"""ResourceManager: the resources of one model and their revisions, as a Python API.

    manager = crud.resource_manager(Article)
    created = await manager.create(Article(title="Sun", content="...", author="alice"), by="alice")
    await manager.update(created.meta.resource_id, Article(...), expect=created.version)
    page = await manager.search(Query(where=field("author").eq("alice"), sort=("-meta.created_time",)))

The HTTP API calls the same methods. Reads are in `engine.reading`. A write becomes an operation (`engine.operations`),
which is planned by the rules of revisions (`engine.planning`), then committed and retried (`engine.writing`). The
storage (`storage.simple_storage`) keeps the metadata in a MetaStore and the data in a ResourceStore.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

from ..errors import ConfigError, CrudError, InvalidData, InvalidQuery, StoreDamaged
from ..query import MAX_LIMIT, Filter, Query
from .basic import Encoding, Hit, IStorage, ModelSpec, Page, ResourceMeta, RevisionInfo, Status
from .contract.overrides import check_storage
from .engine.access_filter import AccessFilter
from .engine.blobs import MAX_BLOB, BlobExecutor, BlobLimits, StoredBlob, blobs_of
from .engine.caller import Caller, IdempotencyKey
from .engine.housekeeping import Housekeeping
from .engine.operations import (
    Create,
    Delete,
    Expected,
    Modify,
    Operation,
    Patch,
    Publish,
    Purge,
    Restore,
    Retention,
    Switch,
    Update,
)
from .engine.reading import ReadExecutor
from .engine.state import ResourceState, StateReader
from .engine.writing import WriteExecutor
from .model.blob import OCTET_STREAM, Blob
from .model.codec import Codec, CodecIndex, ModelData
from .model.resource import Resource
from .model.verification import ANYTHING
from .runtime.threads import shielded
from .storage.simple_storage import SimpleStorage

T = TypeVar("T")

MAX_BATCH = 100
"""Largest number of operations in one batch."""
ANONYMOUS = "anonymous"
"""The name of the caller that is stored if a method is called without `by`."""


class ResourceManager(Generic[T]):
    """Reads and writes the resources of one model. `AutoCRUD.add_model` creates it.

    name            name of the model, as in the URLs of the HTTP API
    codec           decodes, validates and indexes the data
    storage         keeps the resources, and belongs to this manager alone
    encoding        encoding of new bodies; None: the default of the storage
    schema_version  stored with each new revision
    retention       rule that says which superseded revisions are removed; None: all are kept
    clock           returns the time of a write
    blob_limits     limits of its blobs

    Arguments that several methods take:

    by               the caller: a name, or a Caller with an Idempotency-Key or an access filter
    expect           the version that the resource must have, or a set of versions of which it must have one; otherwise
                     raises VersionConflict. None: any version
    read_filter      a resolved filter; if the resource does not match it, raises ResourceNotFound. None: no filter
    include_deleted  return a deleted resource too, instead of raising ResourceDeleted

    Every method may raise StoreUnavailable, StoreDamaged, NotEnoughTime, and Overloaded if large data is processed. A
    write may also raise OutcomeUnknown, WriteContention, Forbidden (by the access filter), and, with an
    Idempotency-Key, KeyReused, KeyInFlight and AnswerGone. The event loop is not blocked while a store works. A manager
    may be used from several event loops at once.
    """

    def __init__(
        self,
        name: str,
        codec: Codec[T],
        storage: IStorage,
        *,
        encoding: Encoding | None,
        schema_version: int,
        retention: Retention | None,
        clock: Callable[[], dt.datetime],
        blob_limits: BlobLimits = BlobLimits(),  # noqa: B008 - immutable
    ) -> None:
        self.name, self.codec, self.storage = name, codec, storage
        self.schema_version, self.retention = schema_version, retention
        self.blob_limits = blob_limits
        self._opened = False
        check_storage(storage)
        storage.bind(ModelSpec(name, codec.fields, codec.unique, schema_version, encoding))
        blobs = blobs_of(name, codec, storage)
        self._states = StateReader(storage, codec)
        self._reads = ReadExecutor(name, storage, codec, self._states)
        self._writes = WriteExecutor(
            storage, codec, self._states, schema_version=schema_version, retention=retention, clock=clock, blobs=blobs
        )
        self._housekeeping = Housekeeping(name, storage, retention=retention, clock=clock, write=self._write)
        self._blobs = None if blobs is None else BlobExecutor(blobs, storage, codec, self._reads, blob_limits)

    async def open(self) -> None:
        """Open the storage, and build its index if needed.

        The first use of the manager does this. Call it earlier to see errors at startup.

        Raises ConfigError if the storage does not fit the model.
        """
        if not self._opened:
            await self.storage.open(CodecIndex(self.codec))
            self._opened = True

    # Read one resource

    async def meta(
        self, resource_id: str, *, include_deleted: bool = False, read_filter: Filter | None = None
    ) -> ResourceMeta:
        """Return the metadata of a resource, without its data. Raises ResourceNotFound or ResourceDeleted."""
        if not self._opened:
            await self.open()
        return await self._reads.meta(resource_id, include_deleted=include_deleted, read_filter=read_filter)

    async def get(
        self,
        resource_id: str,
        *,
        revision: int | None = None,
        include_deleted: bool = False,
        read_filter: Filter | None = None,
    ) -> Resource[T]:
        """Return a resource with its data: in its current revision, or in the revision of the given number.

        Raises ResourceNotFound, ResourceDeleted, RevisionNotFound, or WriteContention if writes replaced the data at
        each attempt to read it.
        """
        if not self._opened:
            await self.open()
        return await self._reads.get(
            resource_id, revision=revision, include_deleted=include_deleted, read_filter=read_filter
        )

    async def revisions(
        self,
        resource_id: str,
        *,
        before: int | None = None,
        limit: int = 50,
        include_deleted: bool = False,
        read_filter: Filter | None = None,
    ) -> Page[RevisionInfo]:
        """Return the records of the revisions of a resource, newest first, without their data.

        before  return only revisions with smaller numbers; `next` of a page is the `before` of the following page
        limit   number of records, from 1 to MAX_LIMIT

        Raises InvalidQuery, ResourceNotFound, ResourceDeleted or WriteContention.
        """
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidQuery(f"limit: expected 1 to {MAX_LIMIT}, got {limit}")
        if not self._opened:
            await self.open()
        return await self._reads.revisions(
            resource_id, before=before, limit=limit, include_deleted=include_deleted, read_filter=read_filter
        )

    # Query many resources

    async def search(self, query: Query | None = None) -> Page[Resource[T]]:
        """Return the resources that a query finds, with their data. None finds all resources that are not deleted.

        A resource that is damaged is left out and logged. Raises InvalidQuery.
        """
        page = await self.search_json(query)
        return Page([Resource(self.codec, document, json) for document, json in page.items], page.next)

    async def search_json(self, query: Query | None = None) -> Page[tuple[bytes, bytes]]:
        """Return the metadata and the data of the resources that `search` finds, as JSON."""
        return await self._reads.search_json(await self._resolved(query))

    async def find(self, query: Query | None = None) -> Page[Hit]:
        """Return the metadata and the indexed fields of the resources that a query finds. Reads the index only.

        A resource whose metadata is damaged is left out and logged. Raises InvalidQuery.
        """
        return await self._reads.find(await self._resolved(query))

    async def count(self, query: Query | None = None) -> int:
        """Return how many resources a query finds. Its sort, limit and cursor are ignored. Raises InvalidQuery."""
        return await self.storage.count(await self._resolved(query))

    async def _resolved(self, query: Query | None) -> Query:
        if not self._opened:
            await self.open()
        return (query or Query()).resolve(self.codec.fields)

    # Write

    async def create(
        self,
        data: T | ModelData[T],
        *,
        resource_id: str | None = None,
        status: Status = "stable",
        by: str | Caller = ANONYMOUS,
    ) -> Resource[T]:
        """Create a resource with its first revision.

        resource_id  id chosen by the caller; None: a new UUID. Raises VersionConflict if the id is taken.
        status       "stable", or "draft" for data that `modify` may replace

        Raises InvalidData, UniqueConflict or MetadataTooLarge.
        """
        return await self._one(Create(data, resource_id, status), by)

    async def update(
        self,
        resource_id: str,
        data: T | ModelData[T],
        *,
        expect: Expected | None = None,
        status: Status = "stable",
        by: str | Caller = ANONYMOUS,
    ) -> Resource[T]:
        """Append a revision with this data and make it the current one. Unchanged data appends nothing.

        Raises ResourceNotFound, ResourceDeleted, VersionConflict, InvalidData, UniqueConflict or MetadataTooLarge.
        """
        return await self._one(Update(resource_id=resource_id, expect=expect, data=data, status=status), by)

    async def modify(
        self, resource_id: str, data: T | ModelData[T], *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        """Replace the data of the current revision, which must be a draft; otherwise raises RevisionIsStable.

        Raises ResourceNotFound, ResourceDeleted, VersionConflict, InvalidData, UniqueConflict or MetadataTooLarge.
        """
        return await self._one(Modify(resource_id=resource_id, expect=expect, data=data), by)

    async def patch(
        self,
        resource_id: str,
        apply: Callable[[Any], Any],
        *,
        size: int = 0,
        work: int | None = None,
        max_bytes: int | None = None,
        expect: Expected | None = None,
        mode: Literal["update", "modify"] = "update",
        status: Status = "stable",
        by: str | Caller = ANONYMOUS,
    ) -> Resource[T]:
        """Apply a function to the current data, then `update` or `modify` with its result.

        apply      takes the data as a tree of JSON and returns the new tree; it may change its argument
        size       bytes of the patch and of the data that it may add, as far as known; an estimate of its cost
        work       steps to apply the patch, besides those on the data (`deadline.operations`); None: `size`
        max_bytes  largest size of the new data as JSON, in bytes; larger data is accepted if the patch does not grow it
        mode       "update" or "modify"

        Raises DataTooLarge, and the errors of `update` or `modify`.
        """
        patch = Patch(
            resource_id=resource_id,
            expect=expect,
            apply=apply,
            size=size,
            work=work,
            max_bytes=max_bytes,
            mode=mode,
            status=status,
        )
        return await self._one(patch, by)

    async def publish(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        """Make the current revision stable. Has no effect if it is stable already.

        Raises ResourceNotFound, ResourceDeleted or VersionConflict.
        """
        return await self._one(Publish(resource_id=resource_id, expect=expect), by)

    async def switch(
        self, resource_id: str, revision: int, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        """Make the revision of this number the current one, without a new revision.

        Raises ResourceNotFound, ResourceDeleted, RevisionNotFound, VersionConflict, UniqueConflict, or InvalidData if
        the data of that revision no longer fits the model.
        """
        return await self._one(Switch(resource_id=resource_id, expect=expect, revision=revision), by)

    async def delete(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> ResourceMeta:
        """Hide a resource, and return its metadata. `restore` shows it again; its unique values stay reserved.

        Raises ResourceNotFound, ResourceDeleted or VersionConflict.
        """
        (state,) = await self._write([Delete(resource_id=resource_id, expect=expect)], by)
        assert state is not None, "only a purge leaves no state"
        return state.meta

    async def restore(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        """Show a deleted resource again. Has no effect if it is not deleted.

        Raises ResourceNotFound or VersionConflict.
        """
        return await self._one(Restore(resource_id=resource_id, expect=expect), by)

    async def purge(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> dt.datetime:
        """Erase a resource with all its revisions, and return the time by which its last remnant will be gone.

        Runs to completion even if the caller is cancelled. Raises ResourceNotFound or VersionConflict. Raises
        OutcomeUnknown also if the resource is purged but its remnants could not be removed; `maintain` removes them
        later.
        """
        _, erased_by = await self._write_and_purge_remnants([Purge(resource_id=resource_id, expect=expect)], by)
        return erased_by

    async def _write_and_purge_remnants(
        self, operations: Sequence[Operation], by: str | Caller
    ) -> tuple[Sequence[ResourceState | None], dt.datetime]:
        async def write_and_purge_remnants() -> tuple[Sequence[ResourceState | None], dt.datetime]:
            return await self._write(operations, by), await self._housekeeping.purge_remnants()

        # A retry after a cancelled request would find no resource, and so would not remove the remnants.
        return await shielded(asyncio.ensure_future(write_and_purge_remnants()))

    async def batch(
        self, operations: Sequence[Operation], *, by: str | Caller = ANONYMOUS
    ) -> list[Resource[T] | ResourceMeta | None]:
        """Commit all operations or none. Each operation sees the effects of those before it.

        Returns one result for each operation: the resource that it leaves, only the metadata for a Delete, and None for
        a Purge. Raises InvalidData unless there are 1 to MAX_BATCH operations, DataTooLarge if the resources take too
        many bytes together, and the errors of the methods for single operations. The attribute `operation` of an error
        is the position of the operation that failed, from 0, or None if it is unknown.
        """
        if not 1 <= len(operations) <= MAX_BATCH:
            raise InvalidData(f"expected 1 to {MAX_BATCH} operations, got {len(operations)}")
        if any(isinstance(operation, Purge) for operation in operations):
            states, _ = await self._write_and_purge_remnants(operations, by)
        else:
            states = await self._write(operations, by)
        results: list[Resource[T] | ResourceMeta | None] = []
        for operation, state in zip(operations, states, strict=True):
            if state is None or isinstance(operation, Purge):
                results.append(None)
            elif isinstance(operation, Delete):
                results.append(state.meta)
            else:
                results.append(await self._resource(state))
        return results

    async def _write(self, operations: Sequence[Operation], by: str | Caller) -> Sequence[ResourceState | None]:
        if not self._opened:
            await self.open()
        try:
            states = await self._writes.commit(operations, by)
        except StoreDamaged as error:
            resource_id = operations[error.operation or 0].resource_id
            raise error if resource_id is None else self._reads.noted(error, resource_id, ANYTHING) from None
        if self._reads.damaged:
            for operation in operations:
                if isinstance(operation, Purge):
                    self._reads.damaged.forget_all(operation.resource_id)
        return states

    async def _one(self, operation: Operation, by: str | Caller) -> Resource[T]:
        (state,) = await self._write([operation], by)
        assert state is not None, "only a purge leaves no state"
        return await self._resource(state)

    async def _resource(self, state: ResourceState) -> Resource[T]:
        return Resource(self.codec, state.meta, await self._states.json(state))

    # Blobs

    async def upload(
        self,
        content: bytes | AsyncIterable[bytes],
        *,
        name: str = "",
        content_type: str = OCTET_STREAM,
        sha256: str | None = None,
        by: str | Caller = ANONYMOUS,
    ) -> Blob:
        """Store a file, and return the reference to it for the data of a resource.

        The caller may use the reference in any resource of this model. A file that no resource refers to is removed
        after a day. If `content` raises, nothing is stored.

        content       the bytes, at once or in chunks; memory use does not depend on their number
        name          file name without a path, at most 255 bytes of UTF-8
        content_type  media type, such as "image/png"
        sha256        expected SHA-256 of the content, in hex; None: any

        Raises InvalidData, DigestMismatch, BlobTooLarge or BlobQuotaExceeded. Raises ConfigError if the model has no
        field of type Blob.
        """
        caller = by.name if isinstance(by, Caller) else by
        executor = await self._opened_blobs()
        return await executor.upload(content, name=name, content_type=content_type, sha256=sha256, caller=caller)

    async def blob(
        self,
        resource_id: str,
        sha256: str,
        *,
        revision: int | None = None,
        include_deleted: bool = False,
        read_filter: Filter | None = None,
    ) -> StoredBlob:
        """Return a blob that a resource refers to, in its current revision or in the one of the given number.

        Its `blob` is the first reference in the data, and its `read` yields bytes.

        Raises BlobNotFound, ResourceNotFound, ResourceDeleted, RevisionNotFound or WriteContention.
        """
        executor = await self._opened_blobs()
        return await executor.find(
            resource_id, sha256, revision=revision, include_deleted=include_deleted, read_filter=read_filter
        )

    async def _opened_blobs(self) -> BlobExecutor[T]:
        if self._blobs is None:
            raise ConfigError(f"the model {self.name!r} has no field of type Blob, so it has no files")
        if not self._opened:
            await self.open()
        return self._blobs

    # Maintain

    async def maintain(self, budget_s: float) -> None:
        """Remove expired revisions, orphaned bodies and remnants of purged resources, for about `budget_s` seconds.

        If the time is too short, the next call continues at the point where this call ended.
        """
        await self.open()
        await self._housekeeping.run(budget_s)

    async def degradations(self) -> list[str]:
        """Return a sentence for each problem that degrades the service although requests are answered.

        Reads some of the damaged resources again, so that repaired ones are no longer reported.
        """
        if self._reads.damaged:
            with contextlib.suppress(CrudError):
                await self.open()
        damaged = await self._reads.degradations()
        return [*await self.storage.degradations(), *damaged]

    async def close(self) -> None:
        """Close the storage. The next use opens it again."""
        self._opened = False
        await self.storage.close()


__all__ = [
    "MAX_BATCH",
    "MAX_BLOB",
    "AccessFilter",
    "BlobLimits",
    "Caller",
    "Create",
    "Delete",
    "IdempotencyKey",
    "Modify",
    "Patch",
    "Publish",
    "Purge",
    "Resource",
    "ResourceManager",
    "Restore",
    "Retention",
    "SimpleStorage",
    "StoredBlob",
    "Switch",
    "Update",
]
