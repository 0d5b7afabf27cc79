"""How a ResourceManager writes: it plans, commits, and plans again if a concurrent write was committed first.

Invariants:

- O1 *An Idempotency-Key is stored by the commit that it belongs to* (see `IdempotentCommit`). So a retry with the same
  key finds either that commit or none, on every machine and after every failure.
- O2 *A request that was committed is not planned again.* The key is looked up before planning, because the operations
  may no longer be possible after their own commit. This lookup only saves work: the commit itself refuses a used key.
- O3 *Contention is retried.* A commit that loses to a concurrent write changes nothing, and the request is planned
  again until CONTENTION_TIMEOUT_S have passed. After that, WriteContention is raised. A request with an expectation
  ends earlier, because planning refuses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ...errors import (
    AnswerGone,
    BlobGone,
    CrudError,
    InvalidData,
    KeyInFlight,
    KeyReused,
    StoreDamaged,
    UniqueConflict,
    VersionConflict,
    WriteContention,
)
from ...query import Compare, Filter, Resolved
from ..basic import AlreadyCommitted, Change, CommitResult, IStorage, ResourceMeta
from ..contract.blobs import Blobs
from ..contract.store_errors import check_name, missing, storable_id
from ..model.codec import Codec
from ..runtime.deadline import check_time
from .caller import Caller, HashedKey
from .operations import Create, Delete, Modify, Operation, Purge, Retention, Update
from .planning import Plan
from .references import References
from .state import ResourceState, StateReader

T = TypeVar("T")

MAX_ATTEMPTS = 16
"""How often a resource is read again if the body that its metadata names is missing."""
CONTENTION_TIMEOUT_S = 25.0
"""Seconds for which a write is retried under contention, on the event loop's clock. API Gateway waits for 30 s."""
LONGEST_PAUSE_S = 0.05
"""Longest pause between two attempts, in seconds."""


class WriteExecutor(Generic[T]):
    """Commits the operations on the resources of one model.

    states          reads the data of the resources
    schema_version  the version of the model, stored with each new revision
    retention       rule that says which superseded revisions a write removes; None: all are kept
    clock           returns the time of a write
    blobs           the blobs of the model; None if its data cannot refer to blobs
    """

    def __init__(
        self,
        storage: IStorage,
        codec: Codec[T],
        states: StateReader,
        *,
        schema_version: int,
        retention: Retention | None,
        clock: Callable[[], dt.datetime],
        blobs: Blobs | None = None,
    ) -> None:
        self._references = None if blobs is None else References(blobs, storage, codec, states)
        self._storage, self._codec, self._states, self._clock = storage, codec, states, clock
        self._schema_version, self._retention = schema_version, retention
        # For each event loop: locks by resource id, for the writes of the loop that met contention.
        self._locks: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, weakref.WeakValueDictionary[str, asyncio.Lock]
        ]
        self._locks = weakref.WeakKeyDictionary()
        self._in_flight: set[str] = set()  # hashed keys of the writes that this process has not answered yet

    async def commit(self, operations: Sequence[Operation], by: str | Caller) -> Sequence[ResourceState | None]:
        """Commit all operations or none, and return the state that each of them leaves.

        If the caller's Idempotency-Key was committed before, returns the states that the first request left, and None
        for purges. Raises KeyInFlight if this process is still working on a request with the key, KeyReused if the key
        belongs to another request, and AnswerGone if a state that the first request left no longer exists. Raises
        WriteContention if concurrent writes won for CONTENTION_TIMEOUT_S, and what the operations and the store raise.
        """
        caller = by if isinstance(by, Caller) else Caller(by)
        check_name(caller.name)
        key = caller.hashed_key()
        if caller.key is None or key is None:
            return await self._retry(operations, caller, None)
        if key.key in self._in_flight:
            raise KeyInFlight("the first request with this key is still under way; ask again in a moment")
        self._in_flight.add(key.key)
        try:
            return await self._retry(operations, caller, key)
        except AlreadyCommitted as before:
            caller.key.replayed = True
            return await self._replay(operations, caller, key, before.done)
        finally:
            self._in_flight.discard(key.key)

    async def _replay(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey, done: CommitResult
    ) -> Sequence[ResourceState | None]:
        """Return the states that an earlier request with this key left. Raises KeyReused or AnswerGone."""
        if done.request != key.request or len(done.results) != len(operations):
            raise KeyReused("this key belongs to another request; nothing was changed, take a new one")
        states: list[ResourceState | None] = []
        for operation, meta in zip(operations, done.results, strict=True):
            if isinstance(operation, Purge):
                states.append(None)
                continue
            # The caller's present access filter decides, not the one at the time of the first request.
            read_filter = None if caller.access_filter is None else caller.access_filter.read
            if read_filter is not None:
                await self._check_readable(operation, meta, read_filter)
            if meta is None:
                raise _answer_gone()
            state = ResourceState(meta)
            if isinstance(operation, Create | Update | Modify):
                model_data = self._codec.accept(operation.data)
                state.json = model_data.json if model_data.hash == meta.data_hash else None
            if not isinstance(operation, Delete):
                try:
                    await self._states.json(state)
                except StoreDamaged:
                    raise _answer_gone() from None
            states.append(state)
        return states

    async def _check_readable(self, operation: Operation, meta: ResourceMeta | None, read_filter: Filter) -> None:
        """Raise ResourceNotFound if the caller may not read the resource in its present state."""
        resource_id = meta.resource_id if meta is not None else operation.resource_id
        if resource_id is None:
            raise _answer_gone()
        if not await self._states.matches(read_filter, ResourceState(await self._storage.get(resource_id))):
            raise missing(resource_id)

    async def _retry(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey | None
    ) -> Sequence[ResourceState | None]:
        """Plan and commit until the commit succeeds, or CONTENTION_TIMEOUT_S have passed.

        Planning again is always correct. An operation with an expectation is checked against the new state and fails
        for good; an operation without one applies to any state. After the first lost attempt, the writes of this event
        loop take a lock for the first resource, so that only other processes and loops compete. The lock only saves
        work; the commit decides.
        """
        first = ""
        for operation in operations:
            if operation.resource_id is not None:
                _check_id(operation.resource_id)
                first = first or operation.resource_id
        lock = self._locks_of_loop().get(first) if self._locks else None
        if lock is None:
            committed = await self._attempt(operations, caller, key)
            if committed is not None and not isinstance(committed, StoreDamaged):
                return committed
            lock = self._locks_of_loop().setdefault(first, asyncio.Lock())
        async with lock:
            loop = asyncio.get_running_loop()
            deadline, attempts, unreadable = loop.time() + CONTENTION_TIMEOUT_S, 0, 0
            while True:
                last = loop.time() >= deadline
                committed = await self._attempt(operations, caller, key)
                if isinstance(committed, StoreDamaged):
                    unreadable += 1
                    if last or unreadable == MAX_ATTEMPTS:
                        raise committed
                elif committed is not None:
                    return committed
                else:
                    unreadable = 0  # the resource has changed, so the next attempt reads another state
                if last:
                    raise contention()
                await asyncio.sleep(min(0.001 * attempts, LONGEST_PAUSE_S))  # let the other write finish
                attempts += 1

    def _locks_of_loop(self) -> weakref.WeakValueDictionary[str, asyncio.Lock]:
        return self._locks.setdefault(asyncio.get_running_loop(), weakref.WeakValueDictionary())

    async def _attempt(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey | None
    ) -> Sequence[ResourceState | None] | StoreDamaged | None:
        """Return the states that the operations leave, or None if a concurrent write was committed first.

        Returns StoreDamaged if a body or a record cannot be read. It may have been replaced or purged after the
        metadata were read, so the caller tries again. Raises AlreadyCommitted if the key was committed before.
        """
        if self._storage.may_be_stale:
            await self._check_unused(key, peek=True)
            try:
                plan, states = await self._plan(operations, caller, peek=True)
            except CrudError:
                plan = None
            if plan is not None and len(plan.writes) == len(operations):
                with contextlib.suppress(BlobGone):  # a row is gone meanwhile: plan again
                    return await self._commit_plan(plan, operations, states, key)
        # A request may be impossible after its own commit (a Delete, for example), so the key is looked up first.
        await self._check_unused(key, peek=False)
        for last in (False, True):
            await self._storage.catch_up()
            try:
                plan, states = await self._plan(operations, caller, peek=False)
            except StoreDamaged as error:
                return error
            except CrudError:
                # Another process may have committed the same request since the lookup, so that it is impossible now.
                await self._check_unused(key, peek=False)
                raise
            try:
                return await self._commit_plan(plan, operations, states, key)
            except BlobGone:  # a row is gone meanwhile, but another one with the same hash may serve
                if last:
                    raise
        return None

    async def _check_unused(self, key: HashedKey | None, *, peek: bool) -> None:
        """Raise AlreadyCommitted if the store reports a commit of this key.

        The lookup may miss recent commits, and with `peek` it may miss more of them. So the commit checks the key
        again.
        """
        if key is not None and (done := await self._storage.done(key.key, peek=peek)) is not None:
            raise AlreadyCommitted(done)

    async def _plan(
        self, operations: Sequence[Operation], caller: Caller, *, peek: bool
    ) -> tuple[Plan[T], list[ResourceState]]:
        plan = Plan(
            self._storage,
            self._codec,
            self._states,
            schema_version=self._schema_version,
            retention=self._retention,
            by=caller.name,
            now=self._clock(),
            access_filter=caller.access_filter,
            references=self._references,
            peek=peek,
        )
        states = []
        for position, operation in enumerate(operations):
            try:
                states.append(await plan.add(operation))
            except CrudError as error:
                error.operation = position
                raise
        return plan, states

    async def _commit_plan(
        self, plan: Plan[T], operations: Sequence[Operation], states: list[ResourceState], key: HashedKey | None
    ) -> Sequence[ResourceState | None] | None:
        if plan.writes or key is not None:  # a key is stored even if the request changes nothing
            check_time()  # the last moment at which an error means that nothing was changed
            once = None if key is None else key.commit_of(operations, states, self._clock())
            try:
                committed = await self._storage.commit(plan.writes, once)
            except (VersionConflict, WriteContention):  # neither has changed anything
                return None
            except UniqueConflict as error:
                error.operation = await self._operation_refused(error, plan, states)
                raise
            for state in states:
                if state.write is not None:
                    state.meta = committed[state.write]  # the storage may have put the body under another uid
        written = {write.change.meta.resource_id for write in plan.writes}
        if unchanged := [id_ for state in states if (id_ := state.meta.resource_id) not in written]:
            await self._storage.confirm(unchanged)
        return states

    async def _operation_refused(self, error: UniqueConflict, plan: Plan[T], states: list[ResourceState]) -> int | None:
        """Return the position of the operation that sets a taken value, or None if the operation is unknown.

        Stores check unique fields after all changes of a batch, so an operation counts only if its index entry is the
        last one of its resource. If two resources of the batch have the value, the later operation is refused.
        """
        last: dict[str, int | None] = {}  # the write that sets the final index entry of a resource; None: it is purged
        for position, write in enumerate(plan.writes):
            if write.change.purge or write.change.index is not None:
                last[write.change.meta.resource_id] = None if write.change.purge else position
        setting = [
            (position, state.meta.resource_id, key)
            for position, state in enumerate(states)
            if state.write is not None and last.get(state.meta.resource_id) == state.write
            if (key := _index_key(plan.writes[state.write].change, error.field)) is not None
        ]
        if error.resource_ids:
            return max((position for position, id_, _ in setting if id_ in error.resource_ids), default=None)
        # The store does not say which resources share the value.
        if len(setting) == 1:
            return setting[0][0]
        seen = set()
        for position, _, key in setting:
            if isinstance(key, list) or key in seen:
                return position
            seen.add(key)
            query = Resolved(where=Compare(error.field, "eq", key), limit=1, include_deleted=True)
            with contextlib.suppress(CrudError):
                if any(hit.meta.resource_id not in last for hit in (await self._storage.search(query)).items):
                    return position
        return None


def _index_key(change: Change, name: str) -> object:
    return None if change.index is None else change.index.keys.get(name)


def _answer_gone() -> AnswerGone:
    return AnswerGone(
        "this was done; what it left has been replaced or purged since, so its answer cannot be told again"
    )


def contention() -> WriteContention:
    """Return the error of a request that lost to concurrent writes at every attempt."""
    return WriteContention("other writers kept changing the resource; nothing was changed, try again")


def _check_id(resource_id: str) -> None:
    if not isinstance(resource_id, str) or not resource_id:
        raise InvalidData("a resource id is a string that is not empty")
    try:
        storable_id(resource_id)
    except ValueError as error:
        raise InvalidData(str(error)) from None
