"""The Lua scripts of RedisMetaStore: each is one atomic step inside Redis. Lua 5.1, Redis 6.2 or later, Valkey.

These are the keys below a prefix. An id never becomes a key: `{hash}` is its SHA-256 in hex, so no id, however long or
hostile, collides with another key. No name here ends with another one, so stores with different prefixes do not
collide.

    meta        hash: `store`, the random id of the store; `seq`, the number of transactions; `head`, the txid of the
                last one; `tx`, the number of entries that `tx` (below) ever had; `generation`; `unique`, a JSON list of
                names; `bytes` of the log; `pause`, the Unix time until which no commit is accepted; `findings`, which
                `storage.reindexing` writes; `format`, 1 if it is missing (L4); `blob_epoch`, the epoch of new uploads;
                `blob_bytes`, the size of all blobs
    ids         set: the hashes of all ids
    res:{hash}  hash: a resource. `s` is its version and nonce, `d` its document, `i` its index entry, `q` its unique
                values (a list in MessagePack), `r{number}` the record of a revision after its uid, `n{uid}` the number
                of that revision, `b{number}` the keys of the blobs that its record names (a list in MessagePack), `t`
                the highest number ever used, `k{operation}:{key}` the fields of `done` that contain its document
    specs       hash: the sets of indexed fields that index entries name
    unique      hash: a value of a unique field -> the hash of the resource that owns it
    shared      hash: such a value -> the hashes of other resources that have it too, in MessagePack. It is used only
                if an index entry was lost and restored
    done        hash: `h:{key}` -> time, number of operations, request; `{operation}:{key}` -> hash and document of a
                result
    keytimes    sorted set: the keys in `done` by their time
    blobs       sorted set: the rows of blobs, `{key} {size} {owner}`, by their bytes
    uses:{key}  sorted set: the records that name a blob, `{id}` NUL `{10**15 - number}` (15 digits), by their bytes
    pins        hash: the pins of exports and imports -> the time of their last renewal, in seconds of the server
    tx          sorted set: `+{txid}` of committed and `-{txid}` of refused transactions, the newest ones, by `meta.tx`
    log         list: the newest transactions; the last one has the number `meta.seq`. Each contains its txid (16 bytes)
                and a line for each change: the hash, then "-" for a purge, or the numbers of the revisions whose
                records were written or removed
    import, importnames: see `meta_store.redis_imports`. Keys that begin with `load`: see `load_scripts`

Invariants:

- L1 *A script writes everything or nothing.* Before its first write, it reads each key that it will write, which
  fails if the key has the wrong type. Redis checks for a read-only replica, a full disk and free memory only before
  the first write of a script, and for memory only at commands that need some. So the first write is such a command.
- L2 *Number, log and resources change together.* The numbers in the log have no gaps.
- L3 *The log names what changed, not how.* A replica reads the log and the present data in one step. So after a purge
  no copy of the contents remains in the log, and replicas follow the log over purges like over other changes.
- L4 *A script that does not know the format of the store writes nothing.* Format 2 is that of a store with blobs. The
  scripts of programs from before the formats do not compare it, but they refuse unique fields that their program does
  not know. So the row of the first blob also adds `BLOBS_MARKER` to `meta.unique`, in the same step.
- L5 *Uses are those of the records.* The script that writes records also writes `b{number}` and `uses:{key}`. It
  refuses keys without a row, and a row is removed only in a step that finds no use of it.
"""

from __future__ import annotations

from .script_parts import BLOBS, COMMON, RESULTS, WRITE, script

COMMIT = script(
    COMMON,
    RESULTS,
    WRITE,
    BLOBS,
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

local changes, now, final, order, uids, lines, named, needs_memory = {}, {}, {}, {}, {}, {}, {}, false
-- The uid of a revision's record after the changes so far; `uids`: what these did, by resource and number.
local function uid_of(c, number)
  local changed = uids[c.hash]
  if changed and changed[number] ~= nil then return changed[number] end
  local record = not (changed and changed.purged) and redis.call('HGET', res(c.hash), 'r' .. number)
  if not record then return false end
  local size, start = string.match(record, '^(%d+):()')
  return string.sub(record, start, start + size - 1)
end
-- The keys that a revision's record names after the changes so far; `named`: what these did, like `uids`.
local function named_by(c, number)
  local changed = named[c.hash]
  if changed and changed[number] then return changed[number] end
  local packed = not (changed and changed.purged) and redis.call('HGET', res(c.hash), 'b' .. number)
  local keys = packed and cmsgpack.unpack(packed) or {}
  for _, key in ipairs(keys) do redis.call('ZCARD', uses_of(key)) end  -- L1
  return keys
end
-- The first key of the new record that has no row, and that the record does not name yet.
local function lacking(c)
  local before = {}
  for _, key in ipairs(named_by(c, c.revision)) do before[key] = true end
  for _, key in ipairs(c.blobs) do
    if not before[key] and not row_of(key) then return key end
    redis.call('ZCARD', uses_of(key))
  end
end
local function note_names(c)
  if c.state == '' then
    for _, name in ipairs(redis.call('HKEYS', res(c.hash))) do
      local number = string.match(name, '^b(%d+)$')
      if number then named_by(c, number) end
    end
    named[c.hash] = {purged = true}
    return
  end
  local after = named[c.hash] or {}
  for number, uid in pairs(uids[c.hash]) do
    if uid == false then
      named_by(c, number)
      after[number] = {}
    end
  end
  if c.record then after[c.revision] = c.blobs end
  named[c.hash] = after
end
for i = 1, num() do
  local c = {hash = arg(), id = arg(), expect = arg(), state = arg(), doc = arg(), blobs = {}}
  local born = arg()
  if arg() == '1' then c.index, c.tokens = arg(), tokens() end
  if arg() == '1' then c.revision, c.uid, c.record = arg(), arg(), arg() end
  c.drop = {}
  for j = 1, num() do c.drop[j] = arg() end
  for j = 1, num() do c.blobs[j] = arg() end
  local found = now[c.hash]
  if found == nil then found = redis.call('HGET', res(c.hash), 's') or '' end
  if found ~= c.expect then return say('conflict', i, found) end
  if born ~= '' and tonumber(born) < generation - 1 and uid_of(c, c.revision) ~= c.uid then return say('stale') end
  local gone = c.record and (format > 1 or #c.blobs > 0) and lacking(c)
  if gone then return say('gone', gone) end
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
  if format > 1 then note_names(c) end
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
local function unname(c, number)
  local packed = format > 1 and redis.call('HGET', res(c.hash), 'b' .. number)
  if not packed then return end
  for _, key in ipairs(cmsgpack.unpack(packed)) do redis.call('ZREM', uses_of(key), use(c.id, number)) end
  redis.call('HDEL', res(c.hash), 'b' .. number)
end
for i, c in ipairs(changes) do
  local r, line = res(c.hash), c.hash
  if c.state == '' then
    for _, name in ipairs(redis.call('HKEYS', r)) do
      if string.sub(name, 1, 1) == 'k' then redis.call('HDEL', DONE, string.sub(name, 2)) end
      local number = string.match(name, '^b(%d+)$')
      if number then unname(c, number) end
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
        unname(c, number)
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
      unname(c, c.revision)
      if #c.blobs > 0 then redis.call('HSET', r, 'b' .. c.revision, cmsgpack.pack(c.blobs)) end
      for _, key in ipairs(c.blobs) do redis.call('ZADD', uses_of(key), 0, use(c.id, c.revision)) end
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

REINDEX = script(
    COMMON,
    WRITE,
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

LOOK = script(
    COMMON,
    """
local expected, candidate, txid, since, cap = arg(), arg(), arg(), num(), num()
if lacks() then return say('damaged') end
if txid == '' then return format > KNOWN and say('format', format) or say('ok') end
if redis.call('ZSCORE', TX, '+' .. txid) then return say('done') end
if redis.call('ZSCORE', TX, '-' .. txid) then return say('refused') end
if store ~= expected then return say('store') end
if since > tx or tx - since >= cap then return say('old') end
note('-', txid, candidate, cap)
return say('refused')
""",
)
"""Returns the state of the store, and whether the transaction of a txid happened. If not, it is refused from now on."""

ADOPT = script(
    COMMON,
    """
if format > KNOWN then return say('format', format) end
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

PAUSE = script(
    COMMON,
    """
redis.call('HSET', META, 'pause', tonumber(redis.call('TIME')[1]) + num())
return say('ok')
""",
)
"""Refuses commits for some seconds, so that ADOPT finds the values unchanged."""
