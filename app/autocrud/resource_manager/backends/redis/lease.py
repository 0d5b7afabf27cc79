"""A cache in Redis for documents of another store: FastSlowMetaStore. docs/design/fast-slow.md explains the protocol.

    {prefix}fast:v:HASH   an entry: its expiry time, the server epoch, a document
    {prefix}fast:t:HASH   a lease: its expiry time, the server epoch, a nonce

The braces are part of the keys. The Lua scripts call a lease `token`, a server epoch `life`, and the lease time
`lease`.

- R1 *A server epoch is one process with one history.* It consists of `run_id`, which is new in each server process, and
  `master_replid`, which is new when a replica becomes a primary. Each script asks the server for both. Entries and
  leases of another epoch are ignored: they come from a dump, or were replicated.
- R2 *An entry expires with the lease under which it was stored. A lease expires `lease_s` after it was granted*, by the
  clock of its server. Both contain their expiry time, so a key that is restored without one expires all the same. An
  expiry time that is too far in the future is ignored, because the clock was set back.
- R3 *A nonce is drawn for one command, which is sent once.* A command that arrives late cannot bring a lease back.
- R4 *Evicting, flushing or losing any of these keys is harmless.* A missing entry is a cache miss. Nothing is stored
  under a missing lease.
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
from .script_parts import Script

log = logging.getLogger("crudstack.redis")

REPLY_LIMIT_S = 0.25
"""Seconds that a command may take, with connecting. The caller can read from the slow store instead."""
NONCE = 12


class Lease(NamedTuple):
    """The right to store entries in a server epoch, for one resource or for the resources of one commit."""

    server_epoch: str
    nonce: bytes


def _script(body: str) -> Script:
    text = _COMMON + body
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = """
local F, lease = KEYS[1], tonumber(ARGV[1])
local function told(answer, name)  -- 40 hexadecimal digits; a plain search for the name, because patterns are slow
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
"""Returns the document of an entry. Without one, returns the server epoch and whether a lease was granted."""

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
    """The cache below one prefix.

    A server epoch names the server process, its history, the database and the prefix. It is None if the server hides
    its `run_id` or `master_replid` from scripts.

    Each method sends a command, and raises StoreUnavailable if there is no reply within REPLY_LIMIT_S. The command may
    then run later.
    """

    def __init__(self, client: Client, prefix: str, lease_s: float) -> None:
        # A cluster places a key by its part in braces, so all these keys are on one server.
        self._client, self._key, self._lease_ms = client, f"{{{prefix or 'crudstack'}}}fast:", int(lease_s * 1000)
        self._location = hashlib.sha256(f"{client.db}/{prefix}".encode()).hexdigest()[:16]
        self._warned = False

    async def read(self, resource_id: str) -> bytes | Lease | None:
        """Return the cached document, or a lease to store it under, or None if another client has the lease."""
        hash_ = digest(resource_id)
        nonce, answer = await self._send(READ, lambda nonce: (hash_, nonce))
        if type(answer) is bytes:
            return answer
        server_epoch = self._server_epoch(answer[0])
        return Lease(server_epoch, nonce) if server_epoch is not None and answer[1] else None

    async def fill(self, resource_id: str, lease: Lease, document: bytes) -> None:
        """Store a document that was read after the lease was granted, unless a write removed the lease since."""
        await self._send(FILL, lambda _: (digest(resource_id), lease.nonce, document), retry=False)

    async def begin_write(self, resource_ids: Sequence[str]) -> Lease | None:
        """Remove the entries and take the leases, before a commit. Returns None if no lease was granted."""
        hashes = [digest(resource_id) for resource_id in resource_ids]
        nonce, answer = await self._send(BEGIN_WRITE, lambda nonce: (nonce, *hashes))
        server_epoch = self._server_epoch(answer)
        return None if server_epoch is None else Lease(server_epoch, nonce)

    async def end_write(self, documents: Mapping[str, bytes], lease: Lease | None) -> str | None:
        """Remove entries and leases after a commit, and return the server epoch in which this happened.

        documents  the documents to store by resource id, b"" for none
        lease      a document is stored only if this lease of its resource still exists; None stores nothing
        """
        parts = [part for rid, document in documents.items() for part in (digest(rid), document)]
        bare = [b"" if at % 2 else part for at, part in enumerate(parts)]
        nonces = iter(() if lease is None else (lease.nonce,))

        def arguments(_: bytes) -> tuple[Any, ...]:
            # If the reply to the first command was lost, it may still arrive, and must then find no lease. So the
            # second command only removes.
            nonce = next(nonces, b"")
            return (nonce, *(parts if nonce else bare))

        _, answer = await self._send(END_WRITE, arguments)
        return self._server_epoch(answer)

    async def cancel_write(self, resource_ids: Sequence[str], lease: Lease) -> None:
        """Give the leases back after a commit that was rejected."""
        await self._send(CANCEL_WRITE, lambda _: (lease.nonce, *map(digest, resource_ids)), retry=False)

    async def server_epoch(self) -> str | None:
        """Return the epoch of the server that answers."""
        _, answer = await self._send(SERVER_EPOCH, lambda _: ())
        return self._server_epoch(answer)

    async def close(self) -> None:
        """Close the connections of this event loop, unless another store uses them."""
        await self._client.close(self)

    def _server_epoch(self, answer: bytes) -> str | None:
        if not answer and not self._warned:
            self._warned = True
            log.error("Redis does not tell scripts its run_id and master_replid (INFO), so nothing is read from it")
        return f"{answer.decode()}/{self._location}" if answer else None

    async def _send(
        self, script: Script, arguments: Callable[[bytes], tuple[Any, ...]], *, retry: bool = True
    ) -> tuple[bytes, Any]:
        """Send a script with a new nonce, and return the nonce and the reply.

        retry  whether to send it once more, with another nonce, if the connection was cut
        """
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
