"""The parts that the Lua scripts of RedisMetaStore share. `scripts` explains the keys and the invariants."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ...contract.blobs import BLOBS_MARKER


class Script(NamedTuple):
    """A Lua script and its SHA-1, by which Redis finds a script that it has already loaded."""

    text: str
    sha: str


def script(*parts: str) -> Script:
    """Return the script that consists of these parts."""
    text = "\n".join(parts)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


FORMAT = 2
"""The newest format of a store that this program knows: format 1, and blobs."""

COMMON = """
local P, at = string.sub(KEYS[1], 1, -5), 0
local function arg() at = at + 1 return ARGV[at] end
local function num() return tonumber(arg()) end
local META, LOG, IDS, SPECS = KEYS[1], P .. 'log', P .. 'ids', P .. 'specs'
local UNIQUE, SHARED, DONE, TIMES, TX = P .. 'unique', P .. 'shared', P .. 'done', P .. 'keytimes', P .. 'tx'
local function res(hash) return P .. 'res:' .. hash end
local meta = redis.call('HMGET', META, 'store', 'seq', 'head', 'tx', 'unique', 'generation', 'bytes', 'pause',
  'format', 'blob_epoch', 'blob_bytes')
local store, seq, head, tx = meta[1] or '', tonumber(meta[2] or 0), meta[3] or '', tonumber(meta[4] or 0)
local unique, generation, bytes = meta[5] or '[]', tonumber(meta[6] or 0), tonumber(meta[7] or 0)
local format, KNOWN = tonumber(meta[9] or 1), FORMAT
local function say(code, ...) return {code, store, tx, unique, generation, ...} end
local function lacks() return store == '' and (redis.call('LLEN', LOG) > 0 or redis.call('SCARD', IDS) > 0) end
local function note(sign, txid, candidate, cap)
  tx = tx + 1
  if store == '' then
    store = candidate
    redis.call('HSET', META, 'findings', '{"healed":true}')
  end
  redis.call('HSET', META, 'store', store, 'tx', tx)
  redis.call('ZADD', TX, tx, sign .. txid)
  redis.call('ZREMRANGEBYRANK', TX, 0, -cap - 1)
end
""".replace("FORMAT", str(FORMAT))

BLOBS = """
local BLOBS, BEHIND = P .. 'blobs', 1e15
local function uses_of(key) return P .. 'uses:' .. key end
-- The row of a key, as it is stored: a key never holds the space that ends it there.
local function row_of(key)
  return redis.call('ZRANGEBYLEX', BLOBS, '[' .. key .. ' ', '(' .. key .. '!', 'LIMIT', 0, 1)[1]
end
-- Marks a store that has blobs (L4 in `scripts`).
local function mark()
  if format < 2 then
    unique = string.sub(unique, 1, -2) .. (unique == '[]' and '' or ',') .. '"MARKER"]'
    redis.call('HSET', META, 'format', 2, 'unique', unique)
  end
end
-- A use by a revision: the numbers are reversed, so that the newest one of a resource comes first.
local function use(id, number) return id .. '\\0' .. string.format('%015.0f', BEHIND - number) end
""".replace("MARKER", BLOBS_MARKER)
"""The functions for blobs."""

# Reads the results that are kept for an Idempotency-Key: a header, and the document after each operation.
RESULTS = """
local function done(key)
  local header = redis.call('HGET', DONE, 'h:' .. key)
  if not header then return false end
  local told = {header}
  for i = 0, tonumber(string.match(header, '^%S+ (%d+)')) - 1 do
    local left = redis.call('HGET', DONE, i .. ':' .. key)
    told[#told + 1] = left and string.sub(left, 65)
  end
  return told
end
"""

# The part that all transactions share: whether it may still happen (see `meta_store.redis`), unique values, the log.
WRITE = """
local expected, candidate, txid, since, cap = arg(), arg(), arg(), num(), num()
local max_entries, max_bytes, minded, width = num(), num(), arg(), num()
local spec, fields = arg(), arg()
if redis.call('ZSCORE', TX, '-' .. txid) then return say('refused') end
if store ~= expected then return say('store') end
if since > tx or tx - since >= cap then return say('old') end
if lacks() then return say('damaged') end
if format > KNOWN then return say('format', format) end
redis.call('LLEN', LOG) redis.call('SCARD', IDS) redis.call('HLEN', UNIQUE) redis.call('HLEN', SHARED)
redis.call('HLEN', DONE) redis.call('ZCARD', TIMES)
local known = redis.call('HEXISTS', SPECS, spec) == 1

local function tokens()
  local list = {}
  for i = 1, width do list[i] = arg() end
  return list
end
local function sharers(token)
  local packed = redis.call('HGET', SHARED, token)
  return packed and cmsgpack.unpack(packed) or {}
end
local function share_among(token, hashes)
  if #hashes > 0 then redis.call('HSET', SHARED, token, cmsgpack.pack(hashes))
  else redis.call('HDEL', SHARED, token) end
end
-- The number of a unique field whose value two resources would have. `final`: what those in `order` end with.
local function clash(order, final)
  local claims = {}
  for _, hash in ipairs(order) do
    for j, token in ipairs(final[hash]) do
      if token ~= '' then
        if claims[token] then return j end
        claims[token] = true
        local holder = redis.call('HGET', UNIQUE, token)
        if holder and holder ~= hash and not final[holder] then return j end
        for _, other in ipairs(sharers(token)) do
          if other ~= hash and not final[other] then return j end
        end
      end
    end
  end
end
-- The first write where memory is needed: it is one that a full server refuses, and with it all.
local function begin() redis.call('HSET', META, 'tx', tx) end
local function release(order)
  for _, hash in ipairs(order) do
    local held = redis.call('HGET', res(hash), 'q')
    for _, token in ipairs(held and cmsgpack.unpack(held) or {}) do
      if redis.call('HGET', UNIQUE, token) == hash then redis.call('HDEL', UNIQUE, token) else
        local rest = {}
        for _, other in ipairs(sharers(token)) do
          if other ~= hash then rest[#rest + 1] = other end
        end
        share_among(token, rest)
      end
    end
  end
end
-- `share`: what another resource holds is shared with it.
local function take(order, final, share)
  for _, hash in ipairs(order) do
    local list = {}
    for _, token in ipairs(final[hash]) do
      if token ~= '' then
        list[#list + 1] = token
        if share and redis.call('HEXISTS', UNIQUE, token) == 1 then
          local all = sharers(token)
          all[#all + 1] = hash
          share_among(token, all)
        else redis.call('HSET', UNIQUE, token, hash) end
      end
    end
    if #list > 0 then redis.call('HSET', res(hash), 'q', cmsgpack.pack(list))
    else redis.call('HDEL', res(hash), 'q') end
  end
end
local function append(lines)
  if not known then redis.call('HSET', SPECS, spec, fields) end
  local entry = txid .. table.concat(lines)
  seq, bytes = seq + 1, bytes + #entry
  local length = redis.call('RPUSH', LOG, entry)
  while length > 0 and (length > max_entries or bytes > max_bytes) do
    bytes, length = bytes - #redis.call('LPOP', LOG), length - 1
  end
  redis.call('HSET', META, 'seq', seq, 'head', txid, 'bytes', bytes)
end
"""
