"""The Lua scripts of RedisMetaStore for blobs and pins. `scripts` explains the keys and the invariants.

Epochs may have 18 digits, which the numbers of Lua do not hold, so they are compared as texts.
"""

from __future__ import annotations

from .script_parts import BLOBS, COMMON, WRITE, script

_EPOCHS = """
local epoch = meta[10] or '0'
local function less(one, other) return #one < #other or (#one == #other and one < other) end
"""

ADD_BLOB = script(
    COMMON,
    WRITE,
    BLOBS,
    _EPOCHS,
    """
local key, at_epoch, size, owner, quota = arg(), arg(), arg(), arg(), arg()
if row_of(key) then return say('ok') end
if less(at_epoch, epoch) then return say('stale') end
local taken = meta[11] or '0'
if quota ~= '' and tonumber(taken) + tonumber(size) > tonumber(quota) then return say('quota', taken) end
redis.call('ZCARD', BLOBS)
begin()
redis.call('ZADD', BLOBS, 0, key .. ' ' .. size .. ' ' .. owner)
redis.call('HINCRBY', META, 'blob_bytes', size)
mark()
note('+', txid, candidate, cap)
return say('ok')
""",
)
"""Stores a row. `less than the epoch` and `beyond the quota` are answered with a code."""

REMOVE_BLOBS = script(
    COMMON,
    BLOBS,
    _EPOCHS,
    """
if lacks() then return {'damaged'} end
if format > KNOWN then return {'format', format} end
local free, rows, raised, freed = {}, {}, epoch, 0
for _ = 1, num() do
  local key, above = arg(), arg()
  if redis.call('ZCARD', uses_of(key)) == 0 then
    free[#free + 1] = key
    local row = row_of(key)
    if row then rows[#rows + 1] = row elseif less(raised, above) then raised = above end
  end
end
redis.call('ZCARD', BLOBS)
for _, row in ipairs(rows) do  -- what frees memory comes first, so that a full server does not refuse it
  local size = string.match(row, ' (%d+) ')
  if redis.call('ZREM', BLOBS, row) == 1 and size ~= '0' then redis.call('HINCRBY', META, 'blob_bytes', '-' .. size) end
end
if raised ~= epoch then redis.call('HSET', META, 'blob_epoch', raised) end
return {'ok', free}
""",
)
"""Removes the rows of those keys that no record names, and returns these keys. It may run twice.

Each key is followed by the epoch above its own, to which the epoch of the store is raised if the key has no row.
"""

ROWS = script(
    COMMON,
    BLOBS,
    """
local rows = {}
for _ = 1, num() do
  local sha256 = arg()
  for _, row in ipairs(redis.call('ZRANGEBYLEX', BLOBS, '[' .. sha256 .. '/', '(' .. sha256 .. '0')) do
    rows[#rows + 1] = row
  end
end
return rows
""",
)
"""Returns the rows with these hashes."""

ROWS_OF_KEYS = script(
    COMMON,
    BLOBS,
    """
local rows = {}
for i = 1, num() do rows[i] = row_of(arg()) or false end
return rows
""",
)

USES = script(
    COMMON,
    BLOBS,
    """
local uses, limit, found, from = uses_of(arg()), num(), {}, '-'
while #found < limit do
  local one = redis.call('ZRANGEBYLEX', uses, from, '+', 'LIMIT', 0, 1)[1]
  if not one then break end
  local id = string.sub(one, 1, -17)
  found[#found + 1] = {id, string.format('%.0f', BEHIND - tonumber(string.sub(one, -15)))}
  from = '[' .. id .. '\\1'
end
return found
""",
)
"""Returns the newest revision of each resource that names a blob, by ascending id."""

BLOB_STATE = script(COMMON, BLOBS, _EPOCHS, "return {epoch, redis.call('ZCARD', BLOBS), meta[11] or '0'}")

PIN = script(
    COMMON,
    """
local PINS, work, life, pin = P .. 'pins', arg(), num(), arg()
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local pins = redis.call('HGETALL', PINS)
for i = 1, #pins, 2 do  -- a time in the future is of a clock that was set back
  if math.abs(now - tonumber(pins[i + 1])) >= life then redis.call('HDEL', PINS, pins[i]) end
end
local held = redis.call('HEXISTS', PINS, pin)
if work == 'has' then return redis.call('HLEN', PINS) end
if work == 'remove' then return redis.call('HDEL', PINS, pin) end
if work == 'add' or held == 1 then redis.call('HSET', PINS, pin, string.format('%.6f', now)) end
return held
""",
)
"""Drops the pins that were not renewed, and then adds, renews, removes or counts pins."""
