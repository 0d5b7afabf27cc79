"""The Lua scripts of RedisMetaStore that only read. `scripts` explains the keys and the invariants."""

from __future__ import annotations

from .script_parts import BLOBS, COMMON, RESULTS, script

DONE = script(COMMON, RESULTS, "return done(arg())")

REVISIONS = script(
    COMMON,
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

FOLLOW = script(
    COMMON,
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

PAGE = script(
    COMMON,
    """
local page, rows = redis.call('SSCAN', IDS, arg(), 'COUNT', arg()), {}
for i, hash in ipairs(page[2]) do rows[i] = redis.call('HGETALL', res(hash)) end
return {page[1], seq, head, rows}
""",
)
"""Returns the cursor of the next page, the position of the store, and some resources with all their data."""

IDS_PAGE = script(
    COMMON,
    """
local page, documents = redis.call('SSCAN', IDS, arg(), 'COUNT', arg()), {}
for _, hash in ipairs(page[2]) do documents[#documents + 1] = redis.call('HGET', res(hash), 'd') or nil end
return {page[1], documents}
""",
)
"""Returns the cursor of the next page, and the documents of some resources."""

RESOURCES = script(
    COMMON,
    BLOBS,
    """
local most, found, work = num(), {}, 0
for i = 1, num() do
  if work >= most then break end
  local r = res(arg())
  local size = redis.call('HLEN', r)
  work = work + size
  if size > 2 * most then found[i] = 0 else
    local numbers, rows, document = {}, {}, redis.call('HGET', r, 'd')
    for _, name in ipairs(redis.call('HKEYS', r)) do
      local number = string.match(name, '^r(%d+)$')
      if number then numbers[#numbers + 1] = tonumber(number) end
      if string.match(name, '^b%d+$') then
        for _, key in ipairs(cmsgpack.unpack(redis.call('HGET', r, name))) do rows[#rows + 1] = row_of(key) or nil end
      end
    end
    table.sort(numbers)
    local one = {document or '', rows}
    for _, number in ipairs(numbers) do
      one[#one + 1] = redis.call('HGET', r, 'r' .. string.format('%.0f', number))
    end
    found[i] = one
  end
end
return found
""",
)
"""Returns the first of these resources: for each one its document, rows of blobs, and records by ascending number.

It returns more than one only if they have at most `most` parts together, and 0 in the place of one that has more than
twice as many.
"""

KEYS_PAGE = script(COMMON, "return redis.call('ZSCAN', TIMES, arg(), 'COUNT', arg())")

RESULTS_OF = script(
    COMMON,
    RESULTS,
    """
local found = {}
for i = 1, num() do found[i] = done(arg()) end
return found
""",
)
"""Returns the results that are kept for these keys, with false for a key that is gone."""
