"""ResourceManager: one model's resources and their revisions, from Python.

    manager = crud.resource_manager(Article)
    created = await manager.create(Article(title="Sun", content="...", author="alice"), by="alice")
    await manager.update(created.meta.resource_id, Article(...), expect=created.version)
    page = await manager.search(Query(where=field("author").eq("alice"), sort=("-meta.created_time",)))

The rules are in `operations`, what is stored how in `simple_storage`. Every method may raise what `errors` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

from ..errors import (
    CrudError,
    InvalidData,
    InvalidQuery,
    OutcomeUnknown,
    ResourceDeleted,
    ResourceNotFound,
    RevisionNotFound,
    StoreDamaged,
    StoreUnavailable,
)
from ..query import MAX_LIMIT, Filter, Query
from .basic import (
    Encoding,
    Hit,
    IStorage,
    ModelSpec,
    Page,
    ResourceMeta,
    RevisionInfo,
    Status,
)
from .contract.overrides import check_storage
from .contract.store_errors import missing, storable_number
from .engine.access_filter import AccessFilter
from .engine.caller import Caller, IdempotencyKey
from .engine.operations import (
    Create,
    Delete,
    Expected,
    Expire,
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
from .engine.page_reading import read_page
from .engine.planning import deleted
from .engine.state import ResourceState, StateReader
from .engine.writing import MAX_ATTEMPTS, WriteExecutor, contention
from .model.codec import Codec, CodecIndex, Document
from .model.resource import Resource
from .model.verification import ANYTHING, DamagedResources, Part, metadata_of, named
from .runtime.threads import shielded
from .storage.simple_storage import SimpleStorage

T = TypeVar("T")

log = logging.getLogger("crudstack.manager")

MAX_BATCH = 100
LOOKED_AT = 10
"""How many damaged resources `degradations` reads again at each call."""
ANONYMOUS = "anonymous"


class ResourceManager(Generic[T]):
    """Made by `AutoCRUD.add_model`; see there for the arguments."""

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
    ) -> None:
        self.name, self.codec, self.storage = name, codec, storage
        self.schema_version, self.retention = schema_version, retention
        self._clock = clock
        self._opened = False
        self._damaged = DamagedResources()
        self._expire_after = ""
        self._erase_owed = False
        self._reader = StateReader(storage, codec)
        self._executor = WriteExecutor(
            storage, codec, self._reader, schema_version=schema_version, retention=retention, clock=clock
        )
        check_storage(storage)
        storage.bind(ModelSpec(name, codec.fields, codec.unique, schema_version, encoding))

    async def open(self) -> None:
        """Make the storage ready; done by the first use, or earlier so that errors show at start."""
        if not self._opened:
            await self.storage.open(CodecIndex(self.codec))
            self._opened = True

    # Reading

    async def meta(
        self, resource_id: str, *, include_deleted: bool = False, read_filter: Filter | None = None
    ) -> ResourceMeta:
        """The metadata. `read_filter`, a resolved filter: what it does not find is not there."""
        try:
            return await self._meta_of(resource_id, include_deleted, read_filter)
        except StoreDamaged as error:
            raise self._noted(error, resource_id, None) from None

    async def _meta_of(self, resource_id: str, include_deleted: bool, read_filter: Filter | None) -> ResourceMeta:
        if not self._opened:
            await self.open()
        meta = await self.storage.get(resource_id)
        for _ in range(MAX_ATTEMPTS):
            try:
                if not await self._reader.matches(read_filter, ResourceState(meta)):
                    raise missing(resource_id)
                break
            except StoreDamaged:
                # Somebody may have replaced a draft meanwhile; only if nobody did is the body lost.
                before, meta = meta, await self.storage.get(resource_id)
                if meta == before:
                    raise
        else:
            raise contention()  # `read_filter` was never compared
        if meta.is_deleted and not include_deleted:
            raise deleted(resource_id)
        return meta

    async def get(
        self,
        resource_id: str,
        *,
        revision: int | None = None,
        include_deleted: bool = False,
        read_filter: Filter | None = None,
    ) -> Resource[T]:
        """The current revision, or the given one; `read_filter` as for `meta`. ResourceNotFound, RevisionNotFound, ResourceDeleted."""
        try:
            found = await self._get(resource_id, revision, include_deleted, read_filter)
        except StoreDamaged as error:
            raise self._noted(error, resource_id, revision) from None
        if self._damaged:
            self._damaged.forget(resource_id, revision)
        return found

    async def _get(
        self, resource_id: str, revision: int | None, include_deleted: bool, read_filter: Filter | None
    ) -> Resource[T]:
        if not self._opened:
            await self.open()
        to_json = self._reader.verifier.read
        for _ in range(MAX_ATTEMPTS):
            try:
                if revision is None:
                    meta, body = await self.storage.get_with_body(resource_id)
                    json = await to_json(meta, body)
                    if read_filter is not None and not await self._reader.matches(
                        read_filter, ResourceState(meta, json)
                    ):
                        raise missing(resource_id)
                    if meta.is_deleted and not include_deleted:
                        raise deleted(resource_id)
                    return Resource(self.codec, meta, json)
                meta = await self.meta(resource_id, include_deleted=include_deleted, read_filter=read_filter)
                info = await self.storage.revision(resource_id, storable_number(revision))
                body = await self.storage.body(info.uid)
                if await self._is_still(meta, read_filter) and info.revision <= meta.total_revision_count:
                    return Resource(self.codec, meta, await to_json(info, body), info)
            except StoreDamaged:
                # Somebody may have replaced a draft, or purged, between the two reads; only if nobody did is the body lost.
                await self._still_lost(resource_id, revision)
        raise contention()

    async def _is_still(self, meta: ResourceMeta, read_filter: Filter | None) -> bool:
        """Whether what was read after `meta` belongs to that state: rights to it are no rights to what came after."""
        return read_filter is None or await self.storage.get(meta.resource_id) == meta

    async def _still_lost(self, resource_id: str, revision: int | None) -> None:
        """Raise StoreDamaged if the body is missing or damaged although its record has not changed in between.

        A copy in a cache may be damaged while the body is not, so copies are dropped before.
        """
        for _ in range(2):
            meta = await self.storage.get(resource_id)
            info = meta if revision is None else await self.storage.revision(resource_id, storable_number(revision))
            await self.storage.drop_copies([info.uid])
            try:
                self._reader.verifier.json(info, await self.storage.body(info.uid))
            except StoreDamaged:
                if await self.storage.get(resource_id) == meta:
                    raise
            else:
                return

    async def revisions(
        self,
        resource_id: str,
        *,
        before: int | None = None,
        limit: int = 50,
        include_deleted: bool = False,
        read_filter: Filter | None = None,
    ) -> Page[RevisionInfo]:
        """History, newest first; `next` of a page is the `before` of the following one."""
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidQuery(f"limit: expected 1 to {MAX_LIMIT}, got {limit}")
        try:
            for _ in range(MAX_ATTEMPTS):
                meta = await self.meta(resource_id, include_deleted=include_deleted, read_filter=read_filter)
                page = await self.storage.revisions(
                    resource_id, before if before is None else storable_number(before), limit
                )
                if await self._is_still(meta, read_filter):
                    return page
        except StoreDamaged as error:
            raise self._noted(error, resource_id, ANYTHING) from None
        raise contention()

    def _noted(self, error: StoreDamaged, resource_id: str, part: Part) -> StoreDamaged:
        """Return an error that names the resource, and remember it for /readyz. A damaged store is told by its health."""
        error = named(error, resource_id)
        if error.resource_id is not None:
            self._damaged.note(resource_id, part)
        return error

    async def degradations(self) -> list[str]:
        """Return a sentence for each thing that does not work as it should although requests are answered.

        Resources that could not be read are read again, a few at each call, so that those that were repaired are not told.
        """
        for resource_id, part in self._damaged.some(LOOKED_AT):
            try:
                await self.get(resource_id, revision=None if part == ANYTHING else part, include_deleted=True)
                if part == ANYTHING:
                    await self.revisions(resource_id, limit=MAX_LIMIT, include_deleted=True)
            except (ResourceNotFound, RevisionNotFound):
                pass
            except CrudError:
                continue
            self._damaged.forget(resource_id, part)
        return [*await self.storage.degradations(), *self._damaged.degradations()]

    async def search(self, query: Query | None = None) -> Page[Resource[T]]:
        """What the query finds, with data."""
        page = await self.search_json(query)
        return Page([Resource(self.codec, document, json) for document, json in page.items], page.next)

    async def search_json(self, query: Query | None = None) -> Page[tuple[bytes, bytes]]:
        """What the query finds, each as the JSON of its metadata and of its data."""
        if not self._opened:
            await self.open()
        resolved = (query or Query()).resolve(self.codec.fields)
        try:
            page, bodies = await read_page(self.storage, resolved)
            return Page(self._reader.verifier.page(page.items, bodies), page.next)
        except StoreDamaged:
            # A draft was replaced in between, or a body is lost; one by one tells, and one that is lost must not hide all others.
            page = await self.storage.search(resolved)
            read = [await self._readable(hit, resolved) for hit in page.items]
            return Page([found for found in read if found is not None], page.next)

    async def _readable(self, hit: Hit, query: Query) -> tuple[bytes, bytes] | None:
        """What was found, as it is now; None if that is nothing that the query finds, or cannot be read."""
        try:
            resource_id = metadata_of(hit).resource_id
            found = await self.get(resource_id, include_deleted=query.include_deleted, read_filter=query.where)
            return found.meta_json, found.json
        except (ResourceNotFound, ResourceDeleted):
            return None
        except StoreDamaged as error:
            if error.resource_id is None:
                self._damaged.note_hit(hit)
            log.error("%s: a resource is left out of a search: %s", self.name, error)
            return None

    async def find(self, query: Query | None = None) -> Page[Hit]:
        """What the query finds, from the index alone."""
        if not self._opened:
            await self.open()
        page = await self.storage.search((query or Query()).resolve(self.codec.fields))
        broken = self._reader.verifier.broken(page.items)
        for hit in broken:  # one that is damaged must not hide all others
            self._damaged.note_hit(hit)
            log.error("%s: metadata is damaged and left out of a search; its body is %s", self.name, hit.uid)
        return Page([hit for hit in page.items if hit not in broken], page.next) if broken else page

    async def count(self, query: Query | None = None) -> int:
        if not self._opened:
            await self.open()
        return await self.storage.count((query or Query()).resolve(self.codec.fields))

    # Writing

    async def create(
        self,
        data: T | Document[T],
        *,
        resource_id: str | None = None,
        status: Status = "stable",
        by: str | Caller = ANONYMOUS,
    ) -> Resource[T]:
        """A new resource; VersionConflict if the chosen id is taken."""
        return await self._one(Create(data, resource_id, status), by)

    async def update(
        self,
        resource_id: str,
        data: T | Document[T],
        *,
        expect: Expected | None = None,
        status: Status = "stable",
        by: str | Caller = ANONYMOUS,
    ) -> Resource[T]:
        return await self._one(Update(resource_id=resource_id, expect=expect, data=data, status=status), by)

    async def modify(
        self, resource_id: str, data: T | Document[T], *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
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
        """Update or modify with what `apply` makes of the current data as a JSON tree. `size`, `work` and `max_bytes`: see Patch."""
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
        return await self._one(Publish(resource_id=resource_id, expect=expect), by)

    async def switch(
        self, resource_id: str, revision: int, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        return await self._one(Switch(resource_id=resource_id, expect=expect, revision=revision), by)

    async def delete(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> ResourceMeta:
        (state,) = await self._write([Delete(resource_id=resource_id, expect=expect)], by)
        assert state is not None, "only what is purged leaves nothing"
        return state.meta

    async def restore(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> Resource[T]:
        return await self._one(Restore(resource_id=resource_id, expect=expect), by)

    async def purge(
        self, resource_id: str, *, expect: Expected | None = None, by: str | Caller = ANONYMOUS
    ) -> dt.datetime:
        """Erase; the time by which the last trace is gone."""
        _, erased_by = await self._write_and_erase([Purge(resource_id=resource_id, expect=expect)], by)
        return erased_by

    async def _write_and_erase(
        self, operations: Sequence[Operation], by: str | Caller
    ) -> tuple[Sequence[ResourceState | None], dt.datetime]:
        async def write_and_erase() -> tuple[Sequence[ResourceState | None], dt.datetime]:
            return await self._write(operations, by), await self._erase()

        # Goes on where the one who asked does not: asked again it would find nothing to erase.
        return await shielded(asyncio.ensure_future(write_and_erase()))

    async def _erase(self) -> dt.datetime:
        """Remove the traces of what was purged. The purge itself is done, whatever becomes of this."""
        try:
            return await self.storage.purge_remnants(self._clock())
        except StoreUnavailable as error:
            self._erase_owed = True
            log.warning("%s: traces of what was purged stay until the next housekeeping: %s", self.name, error)
            raise OutcomeUnknown(
                "it is purged, but its last traces could not be erased yet; housekeeping tries again"
            ) from error

    async def batch(
        self, operations: Sequence[Operation], *, by: str | Caller = ANONYMOUS
    ) -> list[Resource[T] | ResourceMeta | None]:
        """All operations or none, each seeing the ones before it. What is deleted comes back as metadata, what is purged as None."""
        if not 1 <= len(operations) <= MAX_BATCH:
            raise InvalidData(f"expected 1 to {MAX_BATCH} operations, got {len(operations)}")
        if any(isinstance(operation, Purge) for operation in operations):
            states, _ = await self._write_and_erase(operations, by)
        else:
            states = await self._write(operations, by)
        left: list[Resource[T] | ResourceMeta | None] = []
        for operation, state in zip(operations, states, strict=True):
            if state is None or isinstance(operation, Purge):
                left.append(None)
            elif isinstance(operation, Delete):
                left.append(state.meta)
            else:
                left.append(await self._resource(state))
        return left

    async def _write(self, operations: Sequence[Operation], by: str | Caller) -> Sequence[ResourceState | None]:
        if not self._opened:
            await self.open()
        try:
            left = await self._executor.commit(operations, by)
        except StoreDamaged as error:
            resource_id = operations[error.operation or 0].resource_id
            raise error if resource_id is None else self._noted(error, resource_id, ANYTHING) from None
        if self._damaged:
            for operation in operations:
                if isinstance(operation, Purge):
                    self._damaged.forget_all(operation.resource_id)
        return left

    async def _one(self, operation: Operation, by: str | Caller) -> Resource[T]:
        (state,) = await self._write([operation], by)
        assert state is not None, "only what is purged leaves nothing"
        return await self._resource(state)

    async def _resource(self, state: ResourceState) -> Resource[T]:
        return Resource(self.codec, state.meta, await self._reader.json(state))

    # Keeping house

    async def maintain(self, budget_s: float) -> None:
        """Housekeeping: revisions whose days are over, orphaned bodies. Where the time ends, the next call goes on."""
        await self.open()
        deadline = time.monotonic() + budget_s
        if self._erase_owed:
            await self.storage.purge_remnants(self._clock())
            self._erase_owed = False
        if self.retention is not None and self.retention.days is not None:
            await self._expire(deadline)
        await self.storage.maintain(max(0.0, deadline - time.monotonic()))

    async def close(self) -> None:
        """Give back what is open; the next use opens it again."""
        self._opened = False
        await self.storage.close()

    async def _expire(self, deadline: float) -> None:
        async for meta in self.storage.scan():
            if meta.resource_id <= self._expire_after or meta.total_revision_count == 1:
                continue
            if time.monotonic() > deadline:
                return
            await self._expire_one(meta)
            self._expire_after = meta.resource_id
        self._expire_after = ""

    async def _expire_one(self, meta: ResourceMeta) -> None:
        with contextlib.suppress(ResourceNotFound):  # purged meanwhile
            await self._write([Expire(resource_id=meta.resource_id)], "retention")


__all__ = [
    "MAX_BATCH",
    "AccessFilter",
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
    "Switch",
    "Update",
]
