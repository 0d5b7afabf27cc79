"""How a ResourceManager writes: plan, commit, and again where somebody was faster; under an Idempotency-Key at most once.

- O1 *A key is part of the commit that it names* (see `IdempotentCommit`), so whoever comes with it again, on whatever machine and after whatever
  failure, finds that commit or none.
- O2 *What was done is not planned again*: the key is looked up first, because what was done may no longer be possible. What is looked up
  only spares work; the commit decides.
- O3 *Contention is waited out.* If a rival was faster, nothing was changed, and the request is planned again, until its attempts have taken
  CONTENTION_TIMEOUT_S. Only then is the answer WriteContention. A request with an expectation ends earlier: planning refuses it.
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
from ..contract.store_errors import check_name, missing, storable_id
from ..model.codec import Codec
from ..model.verification import Verifier
from ..runtime.deadline import check_time
from .access_filter import holds
from .caller import Caller, HashedKey
from .operations import Create, Delete, Modify, Operation, Purge, Retention, Update
from .planning import Plan, ResourceState

T = TypeVar("T")

MAX_ATTEMPTS = 16
"""How often something is read again because a body that it names is missing."""
CONTENTION_TIMEOUT_S = 25.0
"""How long a write competes with others, on the event loop's clock; API Gateway waits for 30 s."""
LONGEST_PAUSE_S = 0.05


class WriteExecutor(Generic[T]):
    def __init__(
        self,
        storage: IStorage,
        codec: Codec[T],
        *,
        schema_version: int,
        retention: Retention | None,
        clock: Callable[[], dt.datetime],
    ) -> None:
        self._storage, self._codec, self._clock = storage, codec, clock
        self.verifier = Verifier(codec, verified=storage.verified)
        self._schema_version, self._retention = schema_version, retention
        self._turns: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, weakref.WeakValueDictionary[str, asyncio.Lock]
        ]
        self._turns = weakref.WeakKeyDictionary()
        self._in_flight: set[str] = set()  # hashed keys of writes that this process has not answered yet

    async def commit(self, operations: Sequence[Operation], by: str | Caller) -> Sequence[ResourceState | None]:
        """The states that the operations leave; under a key that was used before, those that they left then."""
        caller = by if isinstance(by, Caller) else Caller(by)
        check_name(caller.name)
        key = caller.hashed_key()
        if caller.key is None or key is None:
            return await self._in_turn(operations, caller, None)
        if key.key in self._in_flight:
            raise KeyInFlight("the first request with this key is still under way; ask again in a moment")
        self._in_flight.add(key.key)
        try:
            return await self._in_turn(operations, caller, key)
        except AlreadyCommitted as before:
            caller.key.replayed = True
            return await self._left(operations, caller, key, before.done)
        finally:
            self._in_flight.discard(key.key)

    async def _left(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey, done: CommitResult
    ) -> Sequence[ResourceState | None]:
        """What a commit left that was done before. KeyReused, AnswerGone."""
        if done.request != key.request or len(done.results) != len(operations):
            raise KeyReused("this key belongs to another request; nothing was changed, take a new one")
        states: list[ResourceState | None] = []
        for operation, meta in zip(operations, done.results, strict=True):
            if isinstance(operation, Purge):
                states.append(None)
                continue
            read_filter = None if caller.access_filter is None else caller.access_filter.read
            if read_filter is not None:  # what may not be read now is not there, whatever it was when the key was used
                await self._check_sight(operation, meta, read_filter)
            if meta is None:
                raise _answer_gone()
            state = ResourceState(meta)
            if isinstance(operation, Create | Update | Modify):
                document = self._codec.accept(operation.data)
                state.json = document.json if document.hash == meta.data_hash else None
            if not isinstance(operation, Delete):
                try:
                    await self.json(state)
                except StoreDamaged:
                    raise _answer_gone() from None
            states.append(state)
        return states

    async def _check_sight(self, operation: Operation, meta: ResourceMeta | None, read_filter: Filter) -> None:
        """Raise ResourceNotFound unless the resource of an operation is there for the caller now."""
        resource_id = meta.resource_id if meta is not None else operation.resource_id
        if resource_id is None:
            raise _answer_gone()
        if not await self.holds(read_filter, ResourceState(await self._storage.get(resource_id))):
            raise missing(resource_id)

    async def _in_turn(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey | None
    ) -> Sequence[ResourceState | None]:
        """Plan and commit, again where somebody was faster.

        Planning again is always right: an operation that named a state is checked against the new one and fails for good; one that
        did not is meant for whatever is there. Once a writer has lost, the writers of this event loop take turns at the resource, so
        that only other processes and loops can be faster. Turns save work; they decide nothing.
        """
        first = ""
        for operation in operations:
            if operation.resource_id is not None:
                _check_id(operation.resource_id)
                first = first or operation.resource_id
        turn = self._turns_of_loop().get(first) if self._turns else None
        if turn is None:
            committed = await self._attempt(operations, caller, key)
            if committed is not None and not isinstance(committed, StoreDamaged):
                return committed
            turn = self._turns_of_loop().setdefault(first, asyncio.Lock())
        async with turn:
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
                    unreadable = 0  # somebody was faster, so the next attempt reads another state
                if last:
                    raise contention()
                await asyncio.sleep(min(0.001 * attempts, LONGEST_PAUSE_S))  # let the rival finish
                attempts += 1

    def _turns_of_loop(self) -> weakref.WeakValueDictionary[str, asyncio.Lock]:
        return self._turns.setdefault(asyncio.get_running_loop(), weakref.WeakValueDictionary())

    async def _attempt(
        self, operations: Sequence[Operation], caller: Caller, key: HashedKey | None
    ) -> Sequence[ResourceState | None] | StoreDamaged | None:
        """Return the states that the operations leave; None if somebody was faster; StoreDamaged if a body cannot be read.

        A body that is missing may be that of a draft which somebody has just replaced. Raises DoneBefore if the key was used.
        """
        if self._storage.may_be_stale:
            await self._refuse_again(key, peek=True)
            try:
                plan, states = await self._plan(operations, caller, peek=True)
            except CrudError:
                plan = None
            if plan is not None and len(plan.writes) == len(operations):
                return await self._commit_plan(plan, operations, states, key)
        # What was done may not be possible again, so that comes before planning.
        await self._refuse_again(key, peek=False)
        await self._storage.catch_up()
        try:
            plan, states = await self._plan(operations, caller, peek=False)
        except StoreDamaged as error:
            return error
        except CrudError:
            await self._refuse_again(key, peek=False)  # perhaps because the same request was done elsewhere since
            raise
        return await self._commit_plan(plan, operations, states, key)

    async def _refuse_again(self, key: HashedKey | None, *, peek: bool) -> None:
        """DoneBefore if the key was used, as far as one can see: the commit decides."""
        if key is not None and (done := await self._storage.done(key.key, peek=peek)) is not None:
            raise AlreadyCommitted(done)

    async def _plan(
        self, operations: Sequence[Operation], caller: Caller, *, peek: bool
    ) -> tuple[Plan[T], list[ResourceState]]:
        plan = Plan(
            self._storage,
            self._codec,
            self.verifier,
            schema_version=self._schema_version,
            retention=self._retention,
            by=caller.name,
            now=self._clock(),
            access_filter=caller.access_filter,
            peek=peek,
        )
        states = []
        for at, operation in enumerate(operations):
            try:
                states.append(await plan.add(operation))
            except CrudError as error:
                error.operation = at
                raise
        return plan, states

    async def _commit_plan(
        self, plan: Plan[T], operations: Sequence[Operation], states: list[ResourceState], key: HashedKey | None
    ) -> Sequence[ResourceState | None] | None:
        if plan.writes or key is not None:  # a key is remembered even where nothing changes
            check_time()  # the last moment at which a failure is certain
            once = None if key is None else key.once(operations, states, plan.writes, self._clock())
            try:
                committed = await self._storage.commit(plan.writes, once)
            except (VersionConflict, WriteContention):  # neither has changed anything
                return None
            except UniqueConflict as error:
                error.operation = await self._who_wants(error, plan, states)
                raise
            for write, meta in zip(plan.writes, committed, strict=True):
                if meta is not write.change.meta:  # the storage put the body under another uid
                    for state in states:
                        if state.meta is write.change.meta:
                            state.meta = meta
        written = {write.change.meta.resource_id for write in plan.writes}
        if unchanged := [id_ for state in states if (id_ := state.meta.resource_id) not in written]:
            await self._storage.confirm(unchanged)
        return states

    async def _who_wants(self, error: UniqueConflict, plan: Plan[T], states: list[ResourceState]) -> int | None:
        """Which operation wants the value that is taken, as far as one can see: stores look once all changes are applied."""
        left: dict[str, Change | None] = {}  # what gives a resource its index in the end; None: it is purged
        for change in (write.change for write in plan.writes):
            if change.purge or change.index is not None:
                left[change.meta.resource_id] = None if change.purge else change
        wanted = [
            (at, key)
            for at, state in enumerate(states)
            if (last := left.get(state.meta.resource_id)) is not None and last.meta is state.meta
            if last.index is not None and (key := last.index.keys.get(error.field)) is not None
        ]
        if len(wanted) == 1:
            return wanted[0][0]
        seen = set()
        for at, key in wanted:
            if isinstance(key, list) or key in seen:
                return at
            seen.add(key)
            query = Resolved(where=Compare(error.field, "eq", key), limit=1, include_deleted=True)
            with contextlib.suppress(CrudError):
                if any(hit.meta.resource_id not in left for hit in (await self._storage.search(query)).items):
                    return at
        return None

    async def json(self, state: ResourceState) -> bytes:
        """The data of a state; StoreDamaged."""
        if state.json is None:
            body = await self._storage.body(state.meta.uid)
            state.json = self.verifier.json(state.meta, body)
        return state.json

    async def holds(self, where: Filter | None, state: ResourceState) -> bool:
        return await holds(where, state.meta, lambda: self.json(state), self._codec)


def _answer_gone() -> AnswerGone:
    return AnswerGone(
        "this was done; what it left has been replaced or purged since, so its answer cannot be told again"
    )


def contention() -> WriteContention:
    return WriteContention("other writers kept changing the resource; nothing was changed, try again")


def _check_id(resource_id: str) -> None:
    if not isinstance(resource_id, str) or not resource_id:
        raise InvalidData("a resource id is a string that is not empty")
    try:
        storable_id(resource_id)
    except ValueError as error:
        raise InvalidData(str(error)) from None
