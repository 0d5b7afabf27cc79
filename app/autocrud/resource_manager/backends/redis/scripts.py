"""The Lua scripts of RedisMetaStore: each is one atomic step inside Redis. Lua 5.1, Redis 6.2 or later, Valkey.

These are the keys below a prefix. An id never becomes a key: `{hash}` is its SHA-256 in hex, so no id, however long or
hostile, collides with another key. No name here ends with another one, so stores with different prefixes do not
collide.

    meta        hash: `store`, the random id of the store; `seq`, the number of transactions; `head`, the txid of the
                last one; `tx`, the number of entries that `tx` (below) ever had; `generation`; `unique`, a JSON list of
                names; `bytes` of the log; `pause`, the Unix time until which no commit is accepted; `findings`, which
                `storage.reindexing` writes
    ids         set: the hashes of all ids
    res:{hash}  hash: a resource. `s` is its version and nonce, `d` its document, `i` its index entry, `q` its unique
                values (a list in MessagePack), `r{number}` the record of a revision after its uid, `n{uid}` the number
                of that revision, `t` the highest number ever used, `k{operation}:{key}` the fields of `done` that
                contain its document
    specs       hash: the sets of indexed fields that index entries name
    unique      hash: a value of a unique field -> the hash of the resource that owns it
    shared      hash: such a value -> the hashes of other resources that have it too, in MessagePack. It is used only
                if an index entry was lost and restored
    done        hash: `h:{key}` -> time, number of operations, request; `{operation}:{key}` -> hash and document of a
                result
    keytimes    sorted set: the keys in `done` by their time
    tx          sorted set: `+{txid}` of committed and `-{txid}` of refused transactions, the newest ones, by `meta.tx`
    log         list: the newest transactions; the last one has the number `meta.seq`. Each contains its txid (16 bytes)
                and a line for each change: the hash, then "-" for a purge, or the numbers of the revisions whose
                records were written or removed

Invariants:

- L1 *A script writes everything or nothing.* Before its first write, it reads each key that it will write, which
  fails if the key has the wrong type. Redis checks for a read-only replica, a full disk and free memory only before
  the first write of a script, and for memory only at commands that need some. So the first write is such a command.
- L2 *Number, log and resources change together.* The numbers in the log have no gaps.
- L3 *The log names what changed, not how.* A replica reads the log and the present data in one step. So after a purge
  no copy of the contents remains in the log, and replicas follow the log over purges like over other changes.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A Lua script and its SHA-1, by which Redis finds a script that it has already loaded."""

    text: str
    sha: str


def _script(*parts: str) -> Script:
    text = "\n".join(parts)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = """
local P, at = string.sub(KEYS[1], 1, -5), 0
local function arg() at = at + 1 return ARGV[at] end
local function num() return tonumber(arg()) end
local META, LOG, IDS, SPECS = KEYS[1], P .. 'log', P .. 'ids', P .. 'specs'
local UNIQUE, SHARED, DONE, TIMES, TX = P .. 'unique', P .. 'shared', P .. 'done', P .. 'keytimes', P .. 'tx'
local function res(hash) return P .. 'res:' .. hash end
local meta = redis.call('HMGET', META, 'store', 'seq', 'head', 'tx', 'unique', 'generation', 'bytes', 'pause')
local store, seq, head, tx = meta[1] or '', tonumber(meta[2] or 0), meta[3] or '', tonumber(meta[4] or 0)
local unique, generation, bytes = meta[5] or '[]', tonumber(meta[6] or 0), tonumber(meta[7] or 0)
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
"""

# Reads the results that are kept for an Idempotency-Key: a header, and the document after each operation.
_DONE = """
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
_WRITE = """
local expected, candidate, txid, since, cap = arg(), arg(), arg(), num(), num()
local max_entries, max_bytes, minded, width = num(), num(), arg(), num()
local spec, fields = arg(), arg()
if redis.call('ZSCORE', TX, '-' .. txid) then return say('refused') end
if store ~= expected then return say('store') end
if since > tx or tx - since >= cap then return say('old') end
if lacks() then return say('damaged') end
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

COMMIT = _script(
    _COMMON,
    _DONE,
    _WRITE,
    """
local key, request, time, oldest, results = false, '', '', '', {}
if arg() == '1' then
  key, request, time, oldest = arg(), arg(), arg(), arg()
  local before = done(key)
  if before then return say('done', before) end
  for i = 1, num() do results[i] = {hash = arg(), doc = arg()} end
end
if unique ~= minded then return say('unique') end
if meta[8] and tonumber(redis.call('TIME')[1]) < tonumber(meta[8]) then return say('paused') end

local changes, now, final, order, uids, lines, needs_memory = {}, {}, {}, {}, {}, {}, false
-- The uid of a revision's record after the changes so far; `uids`: what these did, by resource and number.
local function uid_of(c, number)
  local changed = uids[c.hash]
  if changed and changed[number] ~= nil then return changed[number] end
  local record = not (changed and changed.purged) and redis.call('HGET', res(c.hash), 'r' .. number)
  if not record then return false end
  local size, start = string.match(record, '^(%d+):()')
  return string.sub(record, start, start + size - 1)
end
for i = 1, num() do
  local c = {hash = arg(), expect = arg(), state = arg(), doc = arg()}
  local born = arg()
  if arg() == '1' then c.index, c.tokens = arg(), tokens() end
  if arg() == '1' then c.revision, c.uid, c.record = arg(), arg(), arg() end
  c.drop = {}
  for j = 1, num() do c.drop[j] = arg() end
  local found = now[c.hash]
  if found == nil then found = redis.call('HGET', res(c.hash), 's') or '' end
  if found ~= c.expect then return say('conflict', i, found) end
  if born ~= '' and tonumber(born) < generation - 1 and uid_of(c, c.revision) ~= c.uid then return say('stale') end
  now[c.hash] = c.state
  if c.state == '' then uids[c.hash] = {purged = true} else
    uids[c.hash] = uids[c.hash] or {}
    for _, uid in ipairs(c.drop) do
      local number = redis.call('HGET', res(c.hash), 'n' .. uid)
      if number and uid_of(c, number) == uid then uids[c.hash][number] = false end
      for number, one in pairs(uids[c.hash]) do
        if one == uid then uids[c.hash][number] = false end
      end
    end
    if c.record then uids[c.hash][c.revision] = c.uid end
  end
  if c.state == '' or c.index then
    if not final[c.hash] then order[#order + 1] = c.hash end
    final[c.hash] = c.state == '' and {} or c.tokens
  end
  if c.state ~= '' then needs_memory = true end
  changes[i] = c
end
local taken = clash(order, final)
if taken then return say('taken', taken) end

-- Everything is decided; from here on there are only writes. What only purges may do so in a full server.
if needs_memory then begin() end
release(order)
for i, c in ipairs(changes) do
  local r, line = res(c.hash), c.hash
  if c.state == '' then
    for _, name in ipairs(redis.call('HKEYS', r)) do
      if string.sub(name, 1, 1) == 'k' then redis.call('HDEL', DONE, string.sub(name, 2)) end
    end
    redis.call('DEL', r)
    redis.call('SREM', IDS, c.hash)
    line = line .. '-'
  else
    redis.call('SADD', IDS, c.hash)
    redis.call('HSET', r, 's', c.state, 'd', c.doc)
    if c.index then redis.call('HSET', r, 'i', c.index) end
    for _, uid in ipairs(c.drop) do
      local number = redis.call('HGET', r, 'n' .. uid)
      if number then
        redis.call('HDEL', r, 'n' .. uid, 'r' .. number)
        line = line .. ' ' .. number
      end
    end
    if c.record then
      local old = redis.call('HGET', r, 'r' .. c.revision)
      if old then
        local size, start = string.match(old, '^(%d+):()')
        redis.call('HDEL', r, 'n' .. string.sub(old, start, start + size - 1))
      end
      redis.call('HSET', r, 'r' .. c.revision, #c.uid .. ':' .. c.uid .. c.record, 'n' .. c.uid, c.revision)
      local top = tonumber(redis.call('HGET', r, 't') or 0)
      if tonumber(c.revision) > top then redis.call('HSET', r, 't', c.revision) end
      line = line .. ' ' .. c.revision
    end
  end
  lines[i] = line .. '\\n'
end
take(order, final)
if key then
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', TIMES, '-inf', '(' .. oldest, 'LIMIT', 0, 100)) do
    local header = redis.call('HGET', DONE, 'h:' .. old)
    for i = 0, tonumber(header and string.match(header, '^%S+ (%d+)') or 0) - 1 do
      local place = i .. ':' .. old
      local left = redis.call('HGET', DONE, place)
      if left then redis.call('HDEL', res(string.sub(left, 1, 64)), 'k' .. place) end
      redis.call('HDEL', DONE, place)
    end
    redis.call('HDEL', DONE, 'h:' .. old)
    redis.call('ZREM', TIMES, old)
  end
  redis.call('ZADD', TIMES, time, key)
  redis.call('HSET', DONE, 'h:' .. key, time .. ' ' .. #results .. ' ' .. request)
  for i, result in ipairs(results) do
    if result.hash ~= '' and redis.call('EXISTS', res(result.hash)) == 1 then
      local place = (i - 1) .. ':' .. key
      redis.call('HSET', DONE, place, result.hash .. result.doc)
      redis.call('HSET', res(result.hash), 'k' .. place, '')
    end
  end
end
if #changes > 0 then append(lines) end
note('+', txid, candidate, cap)
return say('ok')
""",
)
"""Commits changes. `ScriptArguments.once` and then `ScriptArguments.changes` make its arguments."""

REINDEX = _script(
    _COMMON,
    _WRITE,
    """
if unique ~= minded then return say('unique') end
local share, chosen, lines, order, final = arg() == '1', {}, {}, {}, {}
for _ = 1, num() do
  local e = {hash = arg(), expect = arg(), index = arg(), tokens = tokens()}
  if redis.call('HGET', res(e.hash), 's') == e.expect then
    chosen[#chosen + 1], lines[#lines + 1] = e, e.hash .. '\\n'
    if not final[e.hash] then order[#order + 1] = e.hash end
    final[e.hash] = e.tokens
  end
end
local taken = not share and clash(order, final)
if taken then return say('taken', taken) end
if #chosen > 0 then
  begin()
  release(order)
  for _, e in ipairs(chosen) do redis.call('HSET', res(e.hash), 'i', e.index) end
  take(order, final, share)
  append(lines)
  note('+', txid, candidate, cap)
end
return say('ok')
""",
)
"""Stores new index entries for the resources that are still in the state for which the entries were made."""

LOOK = _script(
    _COMMON,
    """
local expected, candidate, txid, since, cap = arg(), arg(), arg(), num(), num()
if lacks() then return say('damaged') end
if txid == '' then return say('ok') end
if redis.call('ZSCORE', TX, '+' .. txid) then return say('done') end
if redis.call('ZSCORE', TX, '-' .. txid) then return say('refused') end
if store ~= expected then return say('store') end
if since > tx or tx - since >= cap then return say('old') end
note('-', txid, candidate, cap)
return say('refused')
""",
)
"""Returns the state of the store, and whether the transaction of a txid happened. If not, it is refused from now on."""

ADOPT = _script(
    _COMMON,
    """
if store ~= arg() or seq ~= num() or unique ~= arg() then return say('moved') end
redis.call('HLEN', UNIQUE)
local names, count = arg(), num()
for i = at + 1, at + 2 * count, 2 do redis.call('HGET', res(ARGV[i]), 'q') end
redis.call('HSET', META, 'unique', names)
redis.call('HDEL', META, 'pause')
for _ = 1, count do
  local hash, token = arg(), arg()
  local held = redis.call('HGET', res(hash), 'q')
  held = held and cmsgpack.unpack(held) or {}
  held[#held + 1] = token
  redis.call('HSET', res(hash), 'q', cmsgpack.pack(held))
  redis.call('HSET', UNIQUE, token, hash)
end
unique = names
return say('ok')
""",
)
"""Adds unique fields with their values, unless something was written since the values were read."""

PAUSE = _script(
    _COMMON,
    """
redis.call('HSET', META, 'pause', tonumber(redis.call('TIME')[1]) + num())
return say('ok')
""",
)
"""Refuses commits for some seconds, so that ADOPT finds the values unchanged."""

DONE = _script(_COMMON, _DONE, "return done(arg())")

REVISIONS = _script(
    _COMMON,
    """
local r, before, wanted = res(arg()), num(), num()
local function get(numbers, found)
  for first = 1, #numbers, 500 do
    local names = {}
    for i = first, math.min(first + 499, #numbers) do names[#names + 1] = 'r' .. numbers[i] end
    for _, record in ipairs(redis.call('HMGET', r, unpack(names))) do
      if record and #found < wanted then found[#found + 1] = record end
    end
  end
end
local top, dense, found = math.min(before - 1, tonumber(redis.call('HGET', r, 't') or 0)), {}, {}
local bottom = math.max(1, top - 2 * wanted)
for number = top, bottom, -1 do dense[#dense + 1] = number end
get(dense, found)
if #found < wanted and bottom > 1 then  -- retention made holes
  local rest = {}
  for _, name in ipairs(redis.call('HKEYS', r)) do
    local number = tonumber(string.match(name, '^r(%d+)$') or 0)
    if number > 0 and number < bottom then rest[#rest + 1] = number end
  end
  table.sort(rest, function(a, b) return a > b end)
  get(rest, found)
end
return found
""",
)
"""Returns the newest records below a number, each after its uid."""

FOLLOW = _script(
    _COMMON,
    """
if lacks() then return {'damaged'} end
local theirs, at_seq, at_head, limit = arg(), num(), arg(), num()
if store ~= theirs or seq < at_seq then return {'apart', store, seq, head} end
if seq == at_seq then return {head == at_head and 'same' or 'apart', store, seq, head} end
local first = math.max(at_seq, 1)
if redis.call('LLEN', LOG) < seq - first + 1 then return {'apart', store, seq, head} end
local work, txids, order, changed = 0, {}, {}, {}
for i, entry in ipairs(redis.call('LRANGE', LOG, first - seq - 1, math.min(at_seq + limit, seq) - seq - 1)) do
  local txid = string.sub(entry, 1, 16)
  if first + i - 1 == at_seq then
    if txid ~= at_head then return {'apart', store, seq, head} end
  else
    if work >= limit then break end
    txids[#txids + 1] = txid
    for hash, purge, numbers in string.gmatch(string.sub(entry, 17), '(%x+)(%-?)([ %d]*)\\n') do
      local c = changed[hash]
      if not c then
        c = {had = {}, names = {'d', 'i'}}
        changed[hash], order[#order + 1] = c, hash
      end
      c.purged = c.purged or purge == '-'
      for number in string.gmatch(numbers, '%d+') do
        if not c.had[number] then c.had[number], c.names[#c.names + 1] = true, 'r' .. number end
        work = work + 1
      end
      work = work + 1
    end
  end
end
local rows = {}
for i, hash in ipairs(order) do
  local names, row = changed[hash].names, {hash, changed[hash].purged and 1 or 0}
  for from = 1, #names, 500 do
    local to = math.min(from + 499, #names)
    for j, value in ipairs(redis.call('HMGET', res(hash), unpack(names, from, to))) do
      row[#row + 1], row[#row + 2] = names[from + j - 1], value
    end
  end
  rows[i] = row
end
return {'after', store, seq, head, txids, rows}
""",
)
"""Returns the position of the store, and what the first transactions after a given position changed, as it is now.

The reply has the txids, and for each resource its hash, whether it was purged, its document, its index entry, and the
records that were written or removed. It has at most `limit` changes and records, or those of one transaction. If the
log does not continue from the position, the reply says so. The txid of the position shows whether the history is the
same.
"""

PAGE = _script(
    _COMMON,
    """
local page, rows = redis.call('SSCAN', IDS, arg(), 'COUNT', arg()), {}
for i, hash in ipairs(page[2]) do rows[i] = redis.call('HGETALL', res(hash)) end
return {page[1], seq, head, rows}
""",
)
"""Returns the cursor of the next page, the position of the store, and some resources with all their data."""
