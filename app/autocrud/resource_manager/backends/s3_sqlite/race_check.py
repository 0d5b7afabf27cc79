"""Race conditional writes, before a store is trusted to an object storage.

The engine is correct only if a conditional PUT compares and writes in one step. Some servers compare first and write
afterwards. They answer single requests correctly, but tell two concurrent writers that both succeeded, and one
acknowledged write is lost. Only a race of concurrent writers shows it.

Invariant of a round: Several writers send a PUT with the same condition at once. At most one may succeed, and the
object then holds the body of the winner. A round proves something only if there is one winner and all others were
refused. If a round breaks no rule but has no winner or an unknown outcome, it is repeated: S3 answers 409 to PUTs that
conflict, and the network may drop an answer.

A correct storage is never refused. Each attempt creates its own key and writes bodies that no other PUT has, so an ETag
never returns. If a PUT without an answer takes effect late, it either names an ETag that was replaced or a key that
exists, and fails; or it wins, and the round has no winner. No PUT is ever retried.

A race is a sample: a faulty server may pass by luck.
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
"""How often the writers replace the created object in each round. With one replacement, s3proxy 4.1.0 passed 1 of 20
races."""
MAX_REPEATS = 20
LONGEST_PAUSE_S = 0.5
RACE_FOLDER = "race/"

_passed: weakref.WeakSet[ObjectStore] = weakref.WeakSet()
"""Clients whose storage passed a race in this process, so that all models of a bucket share one race."""
_race_locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


class _Inconclusive(NamedTuple):
    """A round that breaks no rule and proves nothing."""

    reason: str


class _Written(NamedTuple):
    """The key, and the ETag that the winner's PUT left."""

    key: str
    etag: str


async def race_conditional_writes(objects: ObjectStore, prefix: str) -> None:
    """Race `If-None-Match: *` and `If-Match` on objects below `{prefix}race/`, and then delete these objects.

    Does nothing if this client passed in this process. The writers of all objects send at once, so each has its own
    connection. Raises ConditionalWritesUnsupported if the storage let two writers win, or kept another content than the
    winner's. Raises StoreUnavailable if a round proved nothing MAX_REPEATS times.
    """
    async with _race_locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
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
        """Run the rounds of one object. In each round the writers create it, and then replace it REPLACED times.

        After a failure the other objects finish their current round, so that no PUT takes effect after the objects were
        deleted.
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

    async def _repeat(self, written: _Written | None) -> _Written | None:
        """Repeat a round until it proves something. Return None if the race has failed.

        The writers replace the object `written`, or create a new one if it is None.
        """
        reason = ""
        for attempt in range(MAX_REPEATS + 1):
            if attempt:
                await asyncio.sleep(min(0.02 * attempt, LONGEST_PAUSE_S))
            if self._failed is not None:
                return None
            result = await self._attempt(written, again=attempt > 0)
            if isinstance(result, _Written):
                return result
            reason = result.reason
        raise StoreUnavailable(
            "the conditional writes of the object storage could not be tested:"
            f" {MAX_REPEATS} repeats of a race between {WRITERS} writers proved nothing ({reason});"
            " check that it answers and that the credentials may write to it, and start again"
        )

    async def _attempt(self, written: _Written | None, *, again: bool) -> _Written | _Inconclusive:
        if written is None:
            key = f"{self._folder}{uuid4().hex}"
            self._keys.append(key)
            return await self._round(key, None)
        if not again:
            return await self._round(written.key, written.etag)
        try:
            found = await self._objects.get(written.key)  # an attempt that proved nothing may have replaced the object
        except StoreUnavailable:
            return _Inconclusive("no answer to a GET")
        return _Inconclusive("an object is missing") if found is None else await self._round(written.key, found.etag)

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
                f"one of {WRITERS} concurrent PUTs with the same {condition} succeeded, and afterwards the object held"
                f" {held}"
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
        f"the object storage does not decide between concurrent writers: {happened}. If more than one writer"
        " succeeds, acknowledged writes are lost without an error. Use a storage whose conditional PUT compares and"
        " writes in one step (Amazon S3 does)"
    )
