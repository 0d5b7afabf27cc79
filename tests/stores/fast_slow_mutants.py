"""Versions of FastSlowMetaStore and of its cache that each lack one guard."""

from __future__ import annotations

import asyncio
import contextlib

from app.autocrud.errors import (
    StoreUnavailable,
)
from app.autocrud.resource_manager.backends.redis.lease import Lease, Leases
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore


class NeitherSettlesNorWaits(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        return None


class DoesNotWait(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.7):
                await super()._end_write(left, lease)


class StoresInAnyLife(FastSlowMetaStore):
    def _in_use(self, server_epoch, fence):
        return True


class StoresInNewLives(FastSlowMetaStore):
    """A writer stores in a life that is in use now, but was not when it committed."""

    async def _end_write(self, left, lease, *, wait=False):
        self._settling = True
        await super()._end_write(left, lease, wait=wait)

    def _proven(self, server_epoch, fence):
        settling, self._settling = self._settling, False
        return self._in_use(server_epoch, fence) if settling else super()._proven(server_epoch, fence)


class TrustsNewLives(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return fence.server_epoch == server_epoch


class TrustsAnyLife(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return True


class ConfirmsNothing(FastSlowMetaStore):
    async def confirm(self, resource_ids):
        return None


class ForgetsWhatKeysLeft(FastSlowMetaStore):
    async def _end_write_of_key(self, done, resource_ids=()):
        return None


class MindsItsOwnLease(FastSlowMetaStore):
    def _seen(self, fence):
        return super()._seen(fence._replace(lease_s=self._lease_s))


MUTANTS = {
    kind.__name__: kind
    for kind in (
        NeitherSettlesNorWaits,
        DoesNotWait,
        StoresInAnyLife,
        TrustsNewLives,
        TrustsAnyLife,
        ForgetsWhatKeysLeft,
        ConfirmsNothing,
        MindsItsOwnLease,
    )
}
LUA_MUTANTS = {
    "another life counts": ("string.sub(text, 14, 93) ~= life", "false"),
    "a document has a lease of its own": (
        "string.sub(token, 1, 93) .. document",
        "string.format('%013.0f', now + lease) .. life .. document",
    ),
    "anybody's token will do": ("string.sub(token, 94) == nonce", "true"),
    "settling leaves tokens": (
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash)",
    ),
    "settling leaves documents": (
        "redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "redis.call('DEL', F .. 't:' .. hash)",
    ),
}


class TellsOneNonceTwice(Leases):
    """Every command of a process has the same nonce."""

    async def _send(self, script, arguments, *, retry=True):
        _, answer = await super()._send(script, lambda _: arguments(b"n" * 12), retry=retry)
        return b"n" * 12, answer


class TrustsUnheardMarks(Leases):
    """A writer settles with the token that it asked for, whether it was granted or not."""

    asked = b""

    async def _send(self, script, arguments, *, retry=True):
        def noted(nonce):
            self.asked = nonce
            return arguments(nonce)

        return await super()._send(script, noted, retry=retry)

    async def begin_write(self, resource_ids):
        try:
            return await super().begin_write(resource_ids)
        except StoreUnavailable:
            return Lease("".join(self._client.server.server_epoch) + "/" + self._location, self.asked)


LEASE_MUTANTS = {kind.__name__: kind for kind in (TellsOneNonceTwice, TrustsUnheardMarks)}
RARE = {"a document has a lease of its own", "TrustsUnheardMarks"}  # tested below
