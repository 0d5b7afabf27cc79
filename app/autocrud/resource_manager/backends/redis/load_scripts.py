"""The Lua scripts that load a whole model into RedisMetaStore. `scripts` explains the other keys.

What is loaded is staged under keys of its own, beside the model, and PUBLISH renames them in one step. `{load}` is the
random id of the load, which no other load has:

    loading:{load}         hash: `until`, the Unix time at which this key expires. Without it, nothing is staged or
                           published
    loadres:{hash}:{load}  becomes `res:{hash}`
    loadids:{load}         becomes `ids`; `loadunique`, `loaddone`, `loadtimes` and `loadblobs` likewise
    loaduses:{key}:{load}  becomes `uses:{key}`
    loadnamed:{load}       set: the keys that have uses

- D1 *A load is complete or does not happen.* PUBLISH compares the numbers of all staged parts with those that the
  loader has counted. The staged keys expire later than `loading:{load}`. So none has expired if that exists.
- D2 *A killed load disappears.* All staged keys expire.
- D3 *A late command is harmless.* A command that stages may run twice, because each of its writes has the same effect
  again. After the end of a load, `loading:{load}` does not exist, and commands of the load change nothing.
- D4 *Replicas read everything again after a load*, because the log does not continue over it: it would have to contain
  all resources. PUBLISH counts as two transactions and leaves the log with one entry, so the log lacks one.
- L1 holds for PUBLISH, because the checks before its first write read each key that it renames. What it overwrites is
  not there in an empty model.
"""

from __future__ import annotations

from .script_parts import BLOBS, COMMON, WRITE, script

LIFE_S = 24 * 3600
"""Seconds after which a load that is not published has failed."""
MARGIN_S = 3600
"""Seconds by which the staged keys outlive the key that the scripts look at."""

_EMPTY = """
-- What an empty model does not have.
local function held()
  if redis.call('SCARD', IDS) > 0 then return 'resources' end
  if redis.call('ZCARD', TIMES) > 0 or redis.call('HLEN', DONE) > 0 then return 'results of Idempotency-Keys' end
  if redis.call('ZCARD', BLOBS) > 0 then return 'files' end
end
"""

_STAGE = """
local load = arg()
local LOADING = P .. 'loading:' .. load
local function staged(name) return P .. 'load' .. name .. ':' .. load end
local function staged_res(hash) return staged('res:' .. hash) end
local function staged_uses(key) return staged('uses:' .. key) end
"""

_UNTIL = """
local limit = redis.call('HGET', LOADING, 'until')
if not limit then return {'lost'} end
local function expire(key) redis.call('EXPIREAT', key, tonumber(limit) + MARGIN) end
""".replace("MARGIN", str(MARGIN_S))

BEGIN = script(
    COMMON,
    BLOBS,
    _EMPTY,
    _STAGE,
    """
if lacks() then return {'damaged'} end
if format > KNOWN then return {'format', format} end
local found = held()
if found then return {'full', found} end
local limit = redis.call('TIME')[1] + num()
redis.call('HSET', LOADING, 'until', string.format('%.0f', limit))
redis.call('EXPIREAT', LOADING, limit)
return {'ok'}
""",
)
"""Begins a load, if the model is empty."""

ADD = script(
    COMMON,
    BLOBS,
    _STAGE,
    _UNTIL,
    """
local width, taken = num(), 0
while at < #ARGV do
  local kind, hash = arg(), arg()
  local r = staged_res(hash)
  if kind == 'm' then
    redis.call('HSET', r, 's', arg(), 'd', arg(), 'i', arg())
    redis.call('SADD', staged('ids'), hash)
    local held = {}
    for i = 1, width do
      local token = arg()
      if token ~= '' then
        held[#held + 1] = token
        if redis.call('HSETNX', staged('unique'), token, hash) == 0
          and redis.call('HGET', staged('unique'), token) ~= hash then taken = i end
      end
    end
    if #held > 0 then redis.call('HSET', r, 'q', cmsgpack.pack(held)) end
    expire(r)
  else
    local id, revision, uid, record, blobs = arg(), arg(), arg(), arg(), {}
    for i = 1, num() do
      blobs[i] = arg()
      local from, to = '[' .. blobs[i] .. ' ', '(' .. blobs[i] .. '!'
      if redis.call('ZLEXCOUNT', staged('blobs'), from, to) == 0 then return {'gone', blobs[i]} end
    end
    if redis.call('HEXISTS', r, 'd') == 0 then return {'lost'} end
    redis.call('HSET', r, 'r' .. revision, #uid .. ':' .. uid .. record, 'n' .. uid, revision)
    if tonumber(revision) > tonumber(redis.call('HGET', r, 't') or 0) then redis.call('HSET', r, 't', revision) end
    if #blobs > 0 then redis.call('HSET', r, 'b' .. revision, cmsgpack.pack(blobs)) end
    for _, key in ipairs(blobs) do
      redis.call('ZADD', staged_uses(key), 0, use(id, revision))
      expire(staged_uses(key))
      redis.call('SADD', staged('named'), key)
    end
  end
end
for _, name in ipairs({'ids', 'unique', 'named'}) do expire(staged(name)) end
return {'ok', taken}
""",
)
"""Stages resources and records. Returns the number of a unique field whose value two resources share, or 0."""

ADD_BLOBS = script(
    COMMON,
    _STAGE,
    _UNTIL,
    """
while at < #ARGV do redis.call('ZADD', staged('blobs'), 0, arg()) end
expire(staged('blobs'))
return {'ok'}
""",
)
"""Stages rows of blobs."""

ADD_KEYS = script(
    COMMON,
    _STAGE,
    _UNTIL,
    """
while at < #ARGV do
  local key, request, time, count = arg(), arg(), arg(), num()
  redis.call('ZADD', staged('times'), time, key)
  redis.call('HSET', staged('done'), 'h:' .. key, time .. ' ' .. count .. ' ' .. request)
  for i = 1, count do
    local hash, doc = arg(), arg()
    local r, place = staged_res(hash), (i - 1) .. ':' .. key
    if hash ~= '' and redis.call('EXISTS', r) == 1 then
      redis.call('HSET', staged('done'), place, hash .. doc)
      redis.call('HSET', r, 'k' .. place, '')
    end
  end
end
for _, name in ipairs({'times', 'done'}) do expire(staged(name)) end
return {'ok'}
""",
)
"""Stages results of Idempotency-Keys."""

PUBLISH = script(
    COMMON,
    WRITE,
    BLOBS,
    _EMPTY,
    _STAGE,
    """
local pin, size = arg(), arg()
if unique ~= minded then return say('unique') end
if meta[8] and tonumber(redis.call('TIME')[1]) < tonumber(meta[8]) then return say('paused') end
local found = held()
if found then return say('full', found) end
if redis.call('EXISTS', LOADING) == 0 then return say('lost') end
if redis.call('HEXISTS', P .. 'pins', pin) == 0 then return say('pin') end
local moves = {}
local function move(from, to) moves[#moves + 1] = {from, to} end
local hashes, keys = redis.call('SMEMBERS', staged('ids')), redis.call('SMEMBERS', staged('named'))
local blobs = redis.call('ZCARD', staged('blobs'))
local counts = {#hashes, redis.call('HLEN', staged('unique')), redis.call('ZCARD', staged('times')), blobs, #keys}
for i = 1, #counts do
  if counts[i] ~= num() then return say('lost') end
end
if counts[3] > 0 and redis.call('EXISTS', staged('done')) == 0 then return say('lost') end
for _, hash in ipairs(hashes) do move(staged_res(hash), res(hash)) end
for _, key in ipairs(keys) do move(staged_uses(key), uses_of(key)) end
for _, move in ipairs(moves) do
  if redis.call('EXISTS', move[1]) == 0 then return say('lost') end
end
for name, to in pairs({ids = IDS, unique = UNIQUE, times = TIMES, done = DONE, blobs = BLOBS}) do
  if redis.call('EXISTS', staged(name)) == 1 then move(staged(name), to) end
end

begin()
for _, move in ipairs(moves) do
  redis.call('PERSIST', move[1])
  redis.call('RENAME', move[1], move[2])
end
redis.call('UNLINK', LOADING, staged('named'))
if blobs > 0 then
  mark()
  redis.call('HSET', META, 'blob_bytes', size)
end
if #hashes > 0 then  -- D4
  if not known then redis.call('HSET', SPECS, spec, fields) end
  seq = seq + 2
  redis.call('DEL', LOG)
  redis.call('RPUSH', LOG, txid)
  redis.call('HSET', META, 'seq', string.format('%.0f', seq), 'head', txid, 'bytes', #txid)
end
note('+', txid, candidate, cap)
return say('ok')
""",
)
"""Publishes what was staged.

The last arguments are the numbers of resources, unique values, Idempotency-Keys, rows, and blobs that records name.
"""

DISCARD = script(
    COMMON,
    _STAGE,
    """
local many = num()
redis.call('DEL', LOADING)
for name, staged_of in pairs({ids = staged_res, named = staged_uses}) do
  local some = redis.call('SPOP', staged(name), many)
  for _, one in ipairs(some) do redis.call('UNLINK', staged_of(one)) end
  if #some > 0 then return 1 end
end
redis.call('UNLINK', staged('unique'), staged('times'), staged('done'), staged('blobs'))
return 0
""",
)
"""Ends a load, and removes some of what it staged. Returns whether there may be more."""
