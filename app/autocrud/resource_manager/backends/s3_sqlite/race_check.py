"""Race conditional writes before a store is trusted to an object storage.

The engine is correct only if a conditional PUT compares and writes in one step. Some servers compare first and write
afterwards. They answer single requests correctly, and two concurrent writers are both told that they succeeded: one
acknowledged write is lost. Only a race shows it.

Invariant of a round: several writers send a PUT with the same condition at once. At most one may succeed, and the
object then holds what the winner wrote. A round proves something only if there is one winner and all others were
refused. Any other round that breaks no rule (no winner, an unknown outcome) is repeated: S3 answers 409 to PUTs that
conflict, and an answer may be lost on its way.

No false alarm: each attempt creates a key of its own and writes bodies that nothing else has, so an ETag never
returns. A PUT without an answer that lands late names an ETag that was replaced or a key that exists, or it wins and
the round has no winner. No PUT is ever retried.

A race is a sample: a server may pass by luck.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import NamedTuple
from uuid import uuid4

from ....errors import ConditionalWritesUnsupported, CrudError, StoreUnavailable
from ..s3.object_store import ObjectStore, Stored, Unknown

log = logging.getLogger("crudstack.s3sqlite")

OBJECTS, WRITERS, ROUNDS = 8, 4, 4
REPLACED = 2
"""How often the writers replace what they created, in each round. With one, s3proxy 4.1.0 passed 1 of 20 races."""
MAX_REPEATS = 20
LONGEST_PAUSE_S = 0.5
RACE_FOLDER = "race/"

_passed: weakref.WeakSet[ObjectStore] = weakref.WeakSet()
"""Clients whose storage passed a race in this process: the models of a bucket share one race."""
_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


class _Inconclusive(NamedTuple):
    """A round that breaks no rule and proves nothing."""

    reason: str


class _Written(NamedTuple):
    """The key, and the ETag that the winner's PUT left."""

    key: str
    etag: str


async def race_conditional_writes(objects: ObjectStore, prefix: str) -> None:
    """Race `If-None-Match: *` and `If-Match` on objects below `{prefix}race/`, and delete these objects.

    Does nothing if this client passed before. All writers of all objects are in flight at once, so each has a connection of its own.
    Raises ConditionalWritesUnsupported if the storage let two writers win, or kept another content than the winner's.
    Raises StoreUnavailable if a round proved nothing again and again.
    """
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        if objects not in _passed:
            await _Race(objects, f"{prefix}{RACE_FOLDER}").run()
            _passed.add(objects)


class _Race:
    def __init__(self, objects: ObjectStore, folder: str) -> None:
        self._objects, self._folder = objects, folder
        self._keys: list[str] = []
        self._failed: CrudError | None = None

    async def run(self) -> None:
        try:
            await asyncio.gather(*(self._race_object() for _ in range(OBJECTS)))
        finally:
            await self._delete()
        if self._failed is not None:
            raise self._failed

    async def _race_object(self) -> None:
        """Run the rounds of one object: in each, the writers create it, and then replace it REPLACED times.

        After a failure the others end with the round that they are in, so that no PUT of theirs lands after the objects were deleted.
        """
        try:
            for _ in range(ROUNDS):
                written = await self._repeat(None)
                for _ in range(REPLACED):
                    if written is not None:
                        written = await self._repeat(written)
        except (ConditionalWritesUnsupported, StoreUnavailable) as error:
            if self._failed is None or isinstance(error, ConditionalWritesUnsupported):
                self._failed = error

    async def _repeat(self, at: _Written | None) -> _Written | None:
        """Run a round until it proves something. `at` is the object to replace; None creates a new one. Return None if the race has failed."""
        reason = ""
        for attempt in range(MAX_REPEATS + 1):
            if attempt:
                await asyncio.sleep(min(0.02 * attempt, LONGEST_PAUSE_S))
            if self._failed is not None:
                return None
            result = await self._attempt(at, again=attempt > 0)
            if isinstance(result, _Written):
                return result
            reason = result.reason
        raise StoreUnavailable(
            "the conditional writes of the object storage could not be tested:"
            f" {MAX_REPEATS} repeats of a race between {WRITERS} writers proved nothing ({reason});"
            " see whether it answers and may be written to, and start again"
        )

    async def _attempt(self, at: _Written | None, *, again: bool) -> _Written | _Inconclusive:
        if at is None:
            key = f"{self._folder}{uuid4().hex}"
            self._keys.append(key)
            return await self._round(key, None)
        if not again:
            return await self._round(at.key, at.etag)
        try:
            found = await self._objects.get(at.key)  # an attempt that proved nothing may have replaced it
        except StoreUnavailable:
            return _Inconclusive("no answer to a GET")
        return _Inconclusive("an object is missing") if found is None else await self._round(at.key, found.etag)

    async def _round(self, key: str, etag: str | None) -> _Written | _Inconclusive:
        condition = "If-None-Match: *" if etag is None else "If-Match"
        bodies = [uuid4().hex.encode() for _ in range(WRITERS)]
        outcomes = await asyncio.gather(*(self._objects.put_if(key, body, etag) for body in bodies))
        winners = [(body, one.etag) for body, one in zip(bodies, outcomes, strict=True) if isinstance(one, Stored)]
        if len(winners) > 1:
            raise _refusal(f"{len(winners)} of {WRITERS} concurrent PUTs with the same {condition} succeeded")
        unknown = [outcome.reason for outcome in outcomes if isinstance(outcome, Unknown)]
        if unknown:
            return _Inconclusive(f"no clear answer to a PUT: {unknown[0]}")
        if not winners:
            return _Inconclusive("no PUT succeeded")
        body, written = winners[0]
        try:
            found = await self._objects.get(key)
        except StoreUnavailable:
            return _Inconclusive("no answer to a GET")
        if found is None or found.body != body:
            held = "nothing" if found is None else "another content"
            raise _refusal(
                f"one of {WRITERS} concurrent PUTs with the same {condition} succeeded, and afterwards the object held {held}"
            )
        return _Written(key, written)

    async def _delete(self) -> None:
        if not self._keys:
            return
        try:
            await self._objects.delete(self._keys)
        except StoreUnavailable as error:
            log.warning("objects of a race stay below %s until they are collected: %s", self._folder, error)


def _refusal(happened: str) -> ConditionalWritesUnsupported:
    return ConditionalWritesUnsupported(
        f"the object storage does not decide between concurrent writers: {happened}. If more than one writer succeeds, acknowledged"
        " writes are lost without an error. Use a storage whose conditional PUT compares and writes in one step (Amazon S3 does)"
    )
