"""The part of RedisMetaStore for imports: the entries of a journal.

import       hash: the entries by name
importnames  sorted set: their names, for listings
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ..backends.redis.script_parts import COMMON, script
from ..contract.import_journal import ImportKeeping
from .redis_access import RedisAccess

_PUT = script(
    COMMON,
    """
local name, value, has, replaces = arg(), arg(), arg(), arg()
local found = redis.call('HGET', P .. 'import', name)
if found == value then return 1 end
if has == '1' then
  if found ~= replaces then return 0 end
elseif found then return 0 end
redis.call('HSET', P .. 'import', name, value)
redis.call('ZADD', P .. 'importnames', 0, name)
return 1
""",
)
_REMOVE = script(
    COMMON,
    """
for i = 1, #ARGV do
  redis.call('HDEL', P .. 'import', ARGV[i])
  redis.call('ZREM', P .. 'importnames', ARGV[i])
end
return 1
""",
)


class RedisImports(RedisAccess, ImportKeeping):
    """A MetaStore in Redis with the journal of an import."""

    @override
    async def import_entry(self, name: str) -> bytes | None:
        found: bytes | None = await self._call("HGET", f"{self._prefix}import", name)
        return found

    @override
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        has = ("0", "") if replaces is None else ("1", replaces)
        return bool(await self._run(_PUT, name, value, *has))

    @override
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        start = f"[{prefix}" if prefix > after else f"({after}"
        end = f"({prefix}\U0010ffff" if prefix else "+"
        names = await self._call(
            "ZRANGEBYLEX", f"{self._prefix}importnames", start if start != "(" else "-", end, "LIMIT", 0, limit
        )
        return [name.decode() for name in names]

    @override
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        await self._run(_REMOVE, *names)
