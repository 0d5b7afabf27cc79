"""Documents in Redis that end by themselves: a cache for truths that are kept elsewhere. What it is good for is argued in `meta_store.fast_slow`.

    {prefix}fast:v:HASH   an entry: when it ends, the life, a document
    {prefix}fast:t:HASH   a token: when it ends, the life, a nonce

The braces stand in the keys.

- R1 *A life is one process with one history*: `run_id`, which every server process draws at its start, and `master_replid`, which is drawn anew
  when a replica becomes a primary. Both are asked of the server by each script, so no connection, proxy or replica can mix them up. What names
  another life counts for nothing: it came from a dump, or was replicated.
- R2 *An entry ends with the token that it was stored upon*, and a token ends a lease after it was granted, by the clock of this one life. It says
  so itself, besides its expiry: a key that somebody puts back without one ends all the same, and one that ends later than a lease from now,
  because the clock was set back, counts for nothing.
- R3 *A nonce is drawn for one command*, which is sent once. So a command that arrives late cannot bring a token back to life.
- R4 *Evicting, flushing or losing any of these keys is harmless*: a missing entry is a miss, and nothing is stored upon a missing token.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ....errors import StoreUnavailable
from .client import Client, ReplyLost
from .script_arguments import digest
from .scripts import Script

log = logging.getLogger("crudstack.redis")

REPLY_LIMIT_S = 0.25
"""How long a command may take, connecting included. Who asks has another place to read from."""
NONCE = 12


class Lease(NamedTuple):
    """A token that was granted to us by a life, for one resource or those of one commit."""

    server_epoch: str
    nonce: bytes


def _script(body: str) -> Script:
    text = _COMMON + body
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = """
local F, lease = KEYS[1], tonumber(ARGV[1])
local function told(answer, name)  -- 40 hexadecimal digits; what comes before them is found as it is, for patterns are slow
  local _, colon = string.find(answer, '\\n' .. name .. ':', 1, true)
  return colon and string.match(answer, '^%x+', colon + 1) or ''
end
local function info(...)
  local answer = redis.pcall('INFO', ...)
  return type(answer) == 'string' and answer or ''
end
local said = info('server', 'replication')
if said == '' then said = info('server') .. info('replication') end  -- before Redis 7
local run, history = told(said, 'run_id'), told(said, 'master_replid')
local life = #run == 40 and #history == 40 and string.find(run, '[^0]') and run .. history or ''
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- How many milliseconds are left to an entry or a token; nil if it counts for nothing.
local function left(text)
  if not text or life == '' or string.sub(text, 14, 93) ~= life then return nil end
  local rest = tonumber(string.sub(text, 1, 13)) - now
  return rest > 0 and rest <= lease and rest or nil
end
local function grant(hash, nonce)
  if life == '' then return false end
  return redis.pcall('SET', F .. 't:' .. hash, string.format('%013.0f', now + lease) .. life .. nonce, 'PX', lease).ok
end
local function held(hash, nonce)
  local token = redis.call('GET', F .. 't:' .. hash)
  return nonce ~= '' and left(token) and string.sub(token, 94) == nonce and token
end
local function store(hash, token, document)
  redis.pcall('SET', F .. 'v:' .. hash, string.sub(token, 1, 93) .. document, 'PX', left(token))
end
"""

READ = _script("""
local hash, nonce = ARGV[2], ARGV[3]
local entry = redis.call('GET', F .. 'v:' .. hash)
if left(entry) then return string.sub(entry, 94) end
if left(redis.call('GET', F .. 't:' .. hash)) then return {life, 0} end
return {life, grant(hash, nonce) and 1 or 0}
""")
"""The document of an entry; otherwise the life, and whether a token was granted."""

FILL = _script("""
local hash, nonce, document = ARGV[2], ARGV[3], ARGV[4]
local token = held(hash, nonce)
if not token then return 0 end
redis.call('DEL', F .. 't:' .. hash)
store(hash, token, document)
return 1
""")

BEGIN_WRITE = _script("""
local nonce = ARGV[2]
for at = 3, #ARGV do
  redis.call('DEL', F .. 'v:' .. ARGV[at], F .. 't:' .. ARGV[at])
  grant(ARGV[at], nonce)
end
return life
""")

END_WRITE = _script("""
local nonce = ARGV[2]
for at = 3, #ARGV, 2 do
  local hash, document = ARGV[at], ARGV[at + 1]
  local token = held(hash, nonce)
  redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)
  if token and document ~= '' then store(hash, token, document) end
end
return life
""")

CANCEL_WRITE = _script("""
local nonce = ARGV[2]
for at = 3, #ARGV do
  if held(ARGV[at], nonce) then redis.call('DEL', F .. 't:' .. ARGV[at]) end
end
return life
""")

SERVER_EPOCH = _script("return life")


class Leases:
    """The cache below one prefix. A life names the server process, the database and the prefix; None where the server does not tell.

    Every method sends one command, and raises StoreUnavailable unless it was answered within REPLY_LIMIT_S; it may then be done later.
    """

    def __init__(self, client: Client, prefix: str, lease_s: float) -> None:
        # What stands in braces decides where a cluster keeps a key: all of these are in one place.
        self._client, self._key, self._lease_ms = client, f"{{{prefix or 'crudstack'}}}fast:", int(lease_s * 1000)
        self._location = hashlib.sha256(f"{client.db}/{prefix}".encode()).hexdigest()[:16]
        self._warned = False

    async def read(self, resource_id: str) -> bytes | Lease | None:
        """The document, a token to fill it in with, or None where somebody else has the token."""
        hash_ = digest(resource_id)
        nonce, answer = await self._send(READ, lambda nonce: (hash_, nonce))
        if type(answer) is bytes:
            return answer
        server_epoch = self._server_epoch(answer[0])
        return Lease(server_epoch, nonce) if server_epoch is not None and answer[1] else None

    async def fill(self, resource_id: str, lease: Lease, document: bytes) -> None:
        """Store what was read after the token was granted, if nobody wrote since."""
        await self._send(FILL, lambda _: (digest(resource_id), lease.nonce, document), retry=False)

    async def begin_write(self, resource_ids: Sequence[str]) -> Lease | None:
        """Remove the entries and take the tokens, before a commit."""
        hashes = [digest(resource_id) for resource_id in resource_ids]
        nonce, answer = await self._send(BEGIN_WRITE, lambda nonce: (nonce, *hashes))
        server_epoch = self._server_epoch(answer)
        return None if server_epoch is None else Lease(server_epoch, nonce)

    async def end_write(self, documents: Mapping[str, bytes], lease: Lease | None) -> str | None:
        """Remove entries and tokens after a commit, and store the documents for which the tokens are still there; an empty one is none. The life
        in which that was done."""
        parts = [part for rid, document in documents.items() for part in (digest(rid), document)]
        bare = [b"" if at % 2 else part for at, part in enumerate(parts)]
        nonces = iter(() if lease is None else (lease.nonce,))

        def arguments(_: bytes) -> tuple[Any, ...]:
            # If the first one was not answered it may still come, and then must find no token; so the second one only removes.
            nonce = next(nonces, b"")
            return (nonce, *(parts if nonce else bare))

        _, answer = await self._send(END_WRITE, arguments)
        return self._server_epoch(answer)

    async def cancel_write(self, resource_ids: Sequence[str], lease: Lease) -> None:
        """Give the tokens back."""
        await self._send(CANCEL_WRITE, lambda _: (lease.nonce, *map(digest, resource_ids)), retry=False)

    async def server_epoch(self) -> str | None:
        _, answer = await self._send(SERVER_EPOCH, lambda _: ())
        return self._server_epoch(answer)

    async def close(self) -> None:
        await self._client.close(self)

    def _server_epoch(self, answer: bytes) -> str | None:
        if not answer and not self._warned:
            self._warned = True
            log.error("Redis does not tell scripts its run_id and master_replid (INFO), so nothing is read from it")
        return f"{answer.decode()}/{self._location}" if answer else None

    async def _send(
        self, script: Script, arguments: Callable[[bytes], tuple[Any, ...]], *, retry: bool = True
    ) -> tuple[bytes, Any]:
        """The answer, and the nonce of the command that it answers. `retry`: once more, as another command, where the connection turns out to
        have been cut."""
        for last in (False, True) if retry else (True,):
            nonce = os.urandom(NONCE)
            try:
                return nonce, await self._client.run_within(
                    self, script, self._key, self._lease_ms, *arguments(nonce), limit_s=REPLY_LIMIT_S
                )
            except ReplyLost:
                if last:
                    break
        raise StoreUnavailable("Redis does not answer")
