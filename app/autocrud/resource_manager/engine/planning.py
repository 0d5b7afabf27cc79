"""The rules of revisions: how each operation changes a resource.

A `Plan` turns operations into writes in their order; each operation sees the effects of those before it. Planning
only reads. One atomic commit then stores all writes, or none if one of these resources was changed since it was read.

- R1 A revision is stable unless the caller asks for a draft. No operation changes the data of a stable revision.
- R2 `update` appends a revision whose parent is the current one. With unchanged data it appends nothing.
- R3 `modify` replaces the body of the current revision if that is a draft. `publish` makes a draft stable.
- R4 `switch` makes another revision the current one, and so the parent of the next update.
- R5 `delete` hides a resource, `restore` shows it again, `purge` erases it. Besides these two, a deleted resource
  accepts only the removal of expired revisions.
- R6 Each write increments the version by one and draws a new nonce. An operation without effect writes nothing.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from msgspec.json import decode as decode_json
from msgspec.structs import replace
from uuid_utils import uuid7

from ...access import Forbidden
from ...errors import (
    DataTooLarge,
    InvalidData,
    MetadataTooLarge,
    ResourceNotFound,
    RevisionIsStable,
    RevisionNotFound,
    StoreDamaged,
    VersionConflict,
    Violation,
)
from ...query import Filter
from ..basic import Change, IndexEntry, IStorage, ResourceMeta, RevisionInfo, Status, Version, Write
from ..contract.limits import check_index, check_items, may_exceed, next_version
from ..contract.store_errors import check_new_id, missing, storable_number
from ..model.codec import Codec, ModelData, canonical_json
from ..model.json_shape import EXPECTED_SHAPE, misshapen
from ..runtime.deadline import check_time
from ..runtime.threads import heavy
from .access_filter import AccessFilter
from .operations import (
    ACTIONS,
    Create,
    Delete,
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
    check_expected,
)
from .references import References
from .state import ResourceState, StateReader, deleted

T = TypeVar("T")

MAX_HELD = 48 * 1024 * 1024
"""Largest total size, in bytes, of the data that the operations of a batch leave. It is in memory until the commit."""


class Plan(Generic[T]):
    """Plans the operations of one attempt to commit a batch, and collects their `writes`.

    states         reads the data of the resources
    by, now        the caller's name and the time, which go into the metadata
    access_filter  the resources that the caller may read and change; None: all
    references     chooses the blobs that data refers to; None: the model has no blobs
    peek           plan on states that may be stale. Use only the planned writes then. Discard errors and operations
                   without effect, because the commit checks only the states that writes replace.
    """

    def __init__(
        self,
        storage: IStorage,
        codec: Codec[T],
        states: StateReader,
        *,
        schema_version: int,
        retention: Retention | None,
        by: str,
        now: dt.datetime,
        access_filter: AccessFilter | None = None,
        references: References[T] | None = None,
        peek: bool = False,
    ) -> None:
        self._get = storage.peek if peek else storage.get
        self.writes: list[Write] = []
        self._storage, self._codec, self._reader = storage, codec, states
        self._schema_version, self._retention, self._references = schema_version, retention, references
        self._by, self._now, self._access_filter = by, now, access_filter
        self._bytes_added = 0  # by patches
        self._bytes_held = 0  # data of the states that the operations leave
        self._states: dict[str, ResourceState | None] = {}
        self._records: dict[tuple[str, int], RevisionInfo] = {}

    async def add(self, operation: Operation) -> ResourceState:
        """Plan one operation and return the state that it leaves.

        Raises Forbidden or ResourceNotFound if the access filter refuses it, the error of the rule that it breaks,
        DataTooLarge if the operations leave more than MAX_HELD bytes, and NotEnoughTime at the deadline.
        """
        check_time()
        access_filter = self._access_filter
        allowed = None if access_filter is None else await self._allowed(access_filter, operation)
        state = await self._add(operation)
        if not isinstance(operation, Delete | Purge | Expire):
            # Read the data for the answer now: after the commit another caller may purge it.
            json = await self._reader.json(state)
            self._bytes_held += len(json)
            if self._bytes_held > MAX_HELD and self._bytes_held > len(json):
                raise DataTooLarge(
                    f"the resources of these operations have over {MAX_HELD} bytes; send fewer of them at once"
                )
        if access_filter is not None and not isinstance(operation, Purge):
            await self._check_left(allowed, state)
        return state

    async def _allowed(self, access_filter: AccessFilter, operation: Operation) -> Filter | None:
        """Return the filter that the state after the operation must match.

        Raises Forbidden or ResourceNotFound if the operation may not be applied to the present state (B1, B2).
        """
        action = ACTIONS[type(operation)]
        if action not in access_filter.change:
            raise Forbidden(f"you may not {action} resources of this model")
        allowed = access_filter.change[action]
        if isinstance(operation, Create):
            return allowed
        state = await self._state(operation.resource_id)
        if state is not None:
            if not await self._reader.matches(access_filter.read, state):
                raise missing(operation.resource_id)
            if not await self._reader.matches(allowed, state):
                raise Forbidden(f"you may not {action} this resource")
        return allowed

    async def _check_left(self, allowed: Filter | None, state: ResourceState) -> None:
        if not await self._reader.matches(allowed, state):
            raise Forbidden("the resource would be none that you may write")

    async def _add(self, operation: Operation) -> ResourceState:
        if isinstance(operation, Create):
            return await self._create(operation)
        state = await self._state(operation.resource_id)
        if state is None:
            raise missing(operation.resource_id)
        meta = state.meta
        if operation.expect is not None:
            check_expected(operation.expect, meta)
        if meta.is_deleted and not isinstance(operation, Restore | Purge | Expire):
            raise deleted(meta.resource_id)
        match operation:
            case Update():
                return await self._append(
                    state, self._codec.accept(operation.data), operation.status, await self._expired(meta, adding=1)
                )
            case Modify():
                return await self._replace(state, self._codec.accept(operation.data))
            case Patch():
                model_data = await self._patched(state, operation)
                if operation.mode == "modify":
                    return await self._replace(state, model_data)
                return await self._append(state, model_data, operation.status, await self._expired(meta, adding=1))
            case Publish():
                return await self._publish(state)
            case Switch():
                return await self._switch(state, operation.revision)
            case Delete():
                return self._mark(state, is_deleted=True)
            case Restore():
                return self._mark(state, is_deleted=False) if meta.is_deleted else state
            case Purge():
                return await self._purge(state)
            case Expire():
                drop = await self._expired(meta, adding=0)
                return self._write(meta, self._next(meta), None, drop=drop, json=state.json) if drop else state

    async def _state(self, resource_id: str) -> ResourceState | None:
        if resource_id not in self._states:
            try:
                self._states[resource_id] = ResourceState(await self._get(resource_id))
            except ResourceNotFound:
                self._states[resource_id] = None
        return self._states[resource_id]

    async def _create(self, operation: Create[T]) -> ResourceState:
        model_data = self._codec.accept(operation.data)
        resource_id = operation.resource_id
        if resource_id is None:
            resource_id = str(uuid7())
        elif await self._state(resource_id) is not None:
            raise VersionConflict(f"resource {resource_id!r} exists already")
        else:
            check_new_id(resource_id)
        model_data, blobs = await self._with_blobs(model_data, None)
        uid, digest, encoding = self._storage.new_uid(), model_data.hash, self._storage.encoding
        meta = ResourceMeta(
            resource_id=resource_id,
            version=1,
            nonce=new_nonce(),
            revision=1,
            total_revision_count=1,
            schema_version=self._schema_version,
            status=operation.status,
            is_deleted=False,
            uid=uid,
            data_hash=digest,
            encoding=encoding,
            created_time=self._now,
            updated_time=self._now,
            created_by=self._by,
            updated_by=self._by,
        )
        if may_exceed(model_data.json):
            index = await self._large_index(resource_id, model_data, None)
        else:
            index = self._codec.index(model_data.data)
        return self._write(None, meta, RevisionInfo.of_change(meta, None, blobs), model_data, index=index)

    async def _with_blobs(
        self, model_data: ModelData[T], replaced: ResourceMeta | None
    ) -> tuple[ModelData[T], tuple[str, ...]]:
        """Return the data with the sizes of its blobs, and their keys. Raises BlobGone. See `references`."""
        if self._references is None or (replaced is not None and model_data.hash == replaced.data_hash):
            return model_data, ()  # unchanged data is not stored
        found = await self._references.of(model_data)
        if not found:
            return model_data, ()
        record = None if replaced is None else await self._current_record(replaced)
        by, access_filter = self._by, self._access_filter
        return await self._references.resolved(model_data, found, record, by=by, access_filter=access_filter)

    async def _append(
        self, state: ResourceState, model_data: ModelData[T], status: Status, drop: tuple[str, ...]
    ) -> ResourceState:
        meta = state.meta
        model_data, blobs = await self._with_blobs(model_data, meta)
        digest = model_data.hash
        if digest == meta.data_hash:
            state.json = model_data.json
            return state
        index = await self._index(model_data, state)
        number = meta.total_revision_count + 1
        new = self._next(
            meta,
            revision=number,
            total_revision_count=number,
            schema_version=self._schema_version,
            status=status,
            uid=self._storage.new_uid(),
            data_hash=digest,
            encoding=self._storage.encoding,
        )
        record = RevisionInfo.of_change(new, meta.revision, blobs)
        return self._write(meta, new, record, model_data, drop, index=index)

    async def _replace(self, state: ResourceState, model_data: ModelData[T]) -> ResourceState:
        meta = state.meta
        if meta.status != "draft":
            raise RevisionIsStable(
                f"revision {meta.revision} of resource {meta.resource_id!r} is stable and never changes;"
                " update it instead"
            )
        model_data, blobs = await self._with_blobs(model_data, meta)
        digest = model_data.hash
        if digest == meta.data_hash:
            state.json = model_data.json
            return state
        index = await self._index(model_data, state)
        encoding = self._storage.encoding
        new = self._next(
            meta, uid=self._storage.new_uid(), data_hash=digest, encoding=encoding, schema_version=self._schema_version
        )
        record = replace(
            await self._current_record(meta),
            uid=new.uid,
            data_hash=digest,
            encoding=encoding,
            schema_version=self._schema_version,
            updated_time=new.updated_time,
            updated_by=self._by,
            blobs=blobs,
        )
        return self._write(meta, new, record, model_data, (meta.uid,), index=index)

    async def _index(self, model_data: ModelData[T], before: ResourceState) -> IndexEntry:
        """Return the index entry of new data, which replaces that of `before`.

        Raises MetadataTooLarge if the entry is larger than `contract.limits` allows, unless the fields
        that are too large were at least as large in `before`.
        """
        if may_exceed(model_data.json):
            return await self._large_index(before.meta.resource_id, model_data, before)
        try:
            return self._codec.index(model_data.data)
        except InvalidData:
            return self._codec.index(model_data.data, decode_json(await self._reader.json(before)))

    async def _large_index(
        self, resource_id: str, model_data: ModelData[T], before: ResourceState | None
    ) -> IndexEntry:
        """Return the index entry of large data. Long work runs in the thread for heavy work, not on the event loop."""
        codec, data = self._codec, model_data.data
        items = codec.items(data)
        try:
            check_items(resource_id, items, {})
            entry = await heavy(len(model_data.json), lambda: codec.index(data), model_data.json)
            check_index(resource_id, entry, None)
        except (InvalidData, MetadataTooLarge):
            if before is None:
                raise
        else:
            return entry
        old = await self._reader.json(before)

        def index_after() -> IndexEntry:
            tree = decode_json(old)
            check_items(resource_id, items, codec.items_kept(tree))
            entry = codec.index(data, tree)
            check_index(resource_id, entry, codec.index_kept(tree))
            return entry

        return await heavy(len(old) + len(model_data.json), index_after, old, model_data.json)

    async def _patched(self, state: ResourceState, operation: Patch) -> ModelData[T]:
        before = await self._reader.json(state)
        model_data = await heavy(
            len(before) + operation.size,
            lambda: self._apply(operation, before),
            before,
            more=operation.size if operation.work is None else operation.work,
        )
        self._bytes_added += max(0, len(model_data.json) - len(before))
        if operation.max_bytes is not None and self._bytes_added > operation.max_bytes:
            raise DataTooLarge(f"the patches make more than {operation.max_bytes} bytes; send fewer of them at once")
        return model_data

    def _apply(self, operation: Patch, before: bytes) -> ModelData[T]:
        """Return the patched data, from the JSON of the data before."""
        try:
            after = canonical_json(operation.apply(decode_json(before)))
        except RecursionError:
            raise InvalidData("the patched data is nested too deeply", (Violation("", "nested too deeply"),)) from None
        most = operation.max_bytes
        if most is not None and len(after) > max(most, len(before)):
            raise DataTooLarge(f"the patched data has {len(after)} bytes; expected at most {most}")
        if (found := misshapen(after)) is not None and misshapen(before) is None:
            raise InvalidData(f"the patched data {found}; {EXPECTED_SHAPE}", (Violation("", found),))
        return self._codec.parse(after)

    async def _publish(self, state: ResourceState) -> ResourceState:
        meta = state.meta
        if meta.status == "stable":
            return state
        new = self._next(meta, status="stable")
        record = replace(
            await self._current_record(meta),
            status="stable",
            updated_time=new.updated_time,
            updated_by=self._by,
        )
        return self._write(meta, new, record, json=state.json)

    async def _switch(self, state: ResourceState, revision: int) -> ResourceState:
        meta = state.meta
        if revision == meta.revision:
            return state
        record = await self._record(meta.resource_id, revision)
        new = self._next(meta, **record.meta_fields)
        json = self._planned_json(record.uid)
        if json is None:
            body = await self._storage.body(record.uid)
            json = self._reader.verifier.json(record, body)
        self._codec.parse(json)  # raises InvalidData if the data no longer fits the model
        return self._write(meta, new, None, json=json, index=self._codec.index_stored(json))

    def _mark(self, state: ResourceState, *, is_deleted: bool) -> ResourceState:
        return self._write(state.meta, self._next(state.meta, is_deleted=is_deleted), None, json=state.json)

    async def _purge(self, state: ResourceState) -> ResourceState:
        meta = state.meta
        uids = {record.uid async for record in self._history(meta.resource_id)}
        change = Change(
            meta=self._next(meta),
            record=None,
            index=None,
            expect=Version(meta.version, meta.nonce),
            drop=tuple(sorted(uids)),
            purge=True,
        )
        self.writes.append(Write(change, None))
        self._states[meta.resource_id] = None
        self._records = {key: record for key, record in self._records.items() if key[0] != meta.resource_id}
        return ResourceState(meta, state.json)

    async def _record(self, resource_id: str, revision: int) -> RevisionInfo:
        planned = self._records.get((resource_id, revision))
        return planned or await self._storage.revision(resource_id, storable_number(revision))

    async def _current_record(self, meta: ResourceMeta) -> RevisionInfo:
        """Return the record of the present revision.

        Raises StoreDamaged if there is none. The resource may have been purged after its metadata was read, and created
        again, so the caller tries again.
        """
        try:
            return await self._record(meta.resource_id, meta.revision)
        except RevisionNotFound:
            raise StoreDamaged(f"the record of revision {meta.revision} of {meta.resource_id!r} is missing") from None

    async def _history(self, resource_id: str, before: int | None = None) -> AsyncIterator[RevisionInfo]:
        """Yield the records of the revisions below a number: first the planned ones, then the stored ones."""
        for (owner, revision), record in self._records.items():
            if owner == resource_id and (before is None or revision < before):
                yield record
        more = True
        while more:
            page = await self._storage.revisions(resource_id, before, 200)
            for record in page.items:
                if (resource_id, record.revision) not in self._records:
                    yield record
            before, more = page.next, page.next is not None

    def _planned_json(self, uid: str) -> bytes | None:
        """Return the data of a revision that this plan writes, as JSON; None if it writes no such revision."""
        for write in self.writes:
            if write.change.record is not None and write.change.record.uid == uid and write.body is not None:
                return self._codec.to_json(write.body, write.change.record.encoding)
        return None

    async def _expired(self, meta: ResourceMeta, adding: int) -> tuple[str, ...]:
        """Return the uids of the revisions that retention removes once `adding` more revisions exist.

        The current revision at that time is never among them.
        """
        keep = self._retention
        if keep is None:
            return ()
        before = None if keep.last is None else meta.total_revision_count + adding + 1 - keep.last
        oldest = None if keep.days is None else self._now - dt.timedelta(days=keep.days)
        return tuple(
            [
                record.uid
                async for record in self._history(meta.resource_id, before)
                if (oldest is None or record.created_time < oldest) and (adding or record.uid != meta.uid)
            ]
        )

    def _next(self, meta: ResourceMeta, **changes: Any) -> ResourceMeta:
        return replace(
            meta,
            version=next_version(meta.version),
            nonce=new_nonce(),
            updated_time=max(self._now, meta.updated_time),
            updated_by=self._by,
            **changes,
        )

    def _write(
        self,
        before: ResourceMeta | None,
        meta: ResourceMeta,
        record: RevisionInfo | None,
        model_data: ModelData[T] | None = None,
        drop: tuple[str, ...] = (),
        *,
        json: bytes | None = None,
        index: IndexEntry | None = None,
    ) -> ResourceState:
        body = None
        if model_data is not None:
            body, json = self._codec.encode(model_data, meta.encoding), model_data.json
        change = Change(
            meta=meta,
            record=record,
            index=index,
            expect="absent" if before is None else Version(before.version, before.nonce),
            drop=drop,
        )
        self.writes.append(Write(change, body))
        if record is not None:
            self._records[meta.resource_id, record.revision] = record
        state = self._states[meta.resource_id] = ResourceState(meta, json, write=len(self.writes) - 1)
        return state


def new_nonce() -> str:
    """Return a random nonce for one state of a resource."""
    return os.urandom(8).hex()
