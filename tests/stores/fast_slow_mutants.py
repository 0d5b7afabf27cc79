"""Variants of FastSlowMetaStore and of its cache that each lack one safeguard."""

from __future__ import annotations

import asyncio
import contextlib

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.redis.lease import Lease, Leases
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore


class NeitherEndsWriteOrWaits(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        return None


class DoesNotWait(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.7):
                await super()._end_write(left, lease)


class StoresInAnyEpoch(FastSlowMetaStore):
    def _in_use(self, server_epoch, fence):
        return True


class StoresInNewEpochs(FastSlowMetaStore):
    """A writer stores in a server epoch that is in use now, but was not when it committed."""

    async def _end_write(self, left, lease, *, wait=False):
        self._ending_write = True
        await super()._end_write(left, lease, wait=wait)

    def _proven(self, server_epoch, fence):
        ending_write, self._ending_write = self._ending_write, False
        return self._in_use(server_epoch, fence) if ending_write else super()._proven(server_epoch, fence)


class TrustsNewEpochs(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return fence.server_epoch == server_epoch


class TrustsAnyEpoch(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return True


class ConfirmsNothing(FastSlowMetaStore):
    async def confirm(self, resource_ids):
        return None


class SkipsEndWriteOfKeys(FastSlowMetaStore):
    async def _end_write_of_key(self, done, resource_ids=()):
        return None


class KnowsOnlyItsOwnLeaseTime(FastSlowMetaStore):
    def _seen(self, fence):
        return super()._seen(fence._replace(lease_s=self._lease_s))


MUTANTS = {
    kind.__name__: kind
    for kind in (
        NeitherEndsWriteOrWaits,
        DoesNotWait,
        StoresInAnyEpoch,
        TrustsNewEpochs,
        TrustsAnyEpoch,
        SkipsEndWriteOfKeys,
        ConfirmsNothing,
        KnowsOnlyItsOwnLeaseTime,
    )
}
LUA_MUTANTS = {
    "entries of other epochs are valid": ("string.sub(text, 14, 93) ~= life", "false"),
    "an entry outlives its lease": (
        "string.sub(token, 1, 93) .. document",
        "string.format('%013.0f', now + lease) .. life .. document",
    ),
    "the nonce of a lease is not compared": ("string.sub(token, 94) == nonce", "true"),
    "END_WRITE keeps the lease": (
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash)",
    ),
    "END_WRITE keeps the entry": (
        "redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "redis.call('DEL', F .. 't:' .. hash)",
    ),
}


class RepeatsOneNonce(Leases):
    """Every command of a process has the same nonce."""

    async def _send(self, script, arguments, *, retry=True):
        _, answer = await super()._send(script, lambda _: arguments(b"n" * 12), retry=retry)
        return b"n" * 12, answer


class TrustsUngrantedLeases(Leases):
    """A writer uses the lease that it requested even if the reply was lost."""

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


LEASE_MUTANTS = {kind.__name__: kind for kind in (RepeatsOneNonce, TrustsUngrantedLeases)}
# Random seeds hardly ever find these two. Each has a test of its own in test_fast_slow_simulation.
RARE = {"an entry outlives its lease", "TrustsUngrantedLeases"}
