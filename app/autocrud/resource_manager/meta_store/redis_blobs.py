"""The part of RedisMetaStore that keeps rows of blobs. `backends.redis.scripts` has the keys, and L4 and L5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from ..backends.redis.blob_scripts import ADD_BLOB, BLOB_STATE, REMOVE_BLOBS, ROWS, USES
from ..backends.redis.script_arguments import row_of
from ..basic import BlobRow, blob_epoch_of
from ..contract.blobs import BlobRows, BlobUsage, BlobUse
from ..contract.store_errors import over_quota, stale_upload
from .redis_access import RedisAccess


class RedisBlobRows(RedisAccess, BlobRows):
    """A MetaStore in Redis with rows of blobs."""

    @override
    async def blob_epoch(self) -> int:
        epoch, _, _ = await self._run(BLOB_STATE)
        return int(epoch)

    @override
    async def blob_usage(self) -> BlobUsage:
        _, blobs, size = await self._run(BLOB_STATE)
        return BlobUsage(int(blobs), int(size))

    @override
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        parameters = [row.key, blob_epoch_of(row.key), row.size, row.owner, "" if quota is None else quota]

        def arguments(_: list[str]) -> list[Any]:
            return parameters

        code, told = await self._transact(ADD_BLOB, arguments, adopts=False)
        if code == b"stale":
            raise stale_upload(row.key)
        if code == b"quota":
            raise over_quota(row, int(told[0]), quota or 0)

    @override
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        wanted = sorted(set(sha256s))
        return [row_of(row) for row in await self._run(ROWS, len(wanted), *wanted)] if wanted else []

    @override
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        return [BlobUse(rid.decode(), int(number)) for rid, number in await self._run(USES, key, limit)]

    @override
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        wanted = list(dict.fromkeys(keys))
        above = [part for key in wanted for part in (key, blob_epoch_of(key) + 1)]
        if not wanted:
            return []
        # It may run twice: no commit can name a removed row again. If it runs late, a later sweep finds the content.
        code, *told = await self._run(REMOVE_BLOBS, len(wanted), *above)
        self._check(code, told)
        return [key.decode() for key in told[0]]
