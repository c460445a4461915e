"""What has to be one step for a consumer group of a stream: scripts, because a transaction cannot decide.

The server runs each without anything in between, by its own clock. They are written so that an error leaves nothing
half done: what may be refused (a full memory, a name that something else has) comes before what depends on it.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "BURY",
    "COUNT",
    "FROM_THE_DEAD",
    "LEASE",
    "LEAVE",
    "POSTPONE",
    "RELEASE",
    "RENEW",
    "TAKE",
    "TRIM",
    "WAITING",
    "WAITS",
]

WAITING: Final = "~later"
"""The consumer who has the entries that wait for their time; no process has this name."""

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

WAITS: Final = 1
FROM_THE_DEAD: Final = 2
"""What `TAKE` says of an entry: it waits for its time yet, or whoever had it is gone. Else it is 0."""

TAKE: Final = (
    _NOW
    + """
-- KEYS stream, times; ARGV group, consumer, waiting, room, idle, from, all
-- Claim what is due, and from `from` on what nobody has kept for `idle` milliseconds. With all = '1' whatever is
-- pending, in order; what waits for its time is shown then, but not claimed. Claiming counts as no delivery.
-- Answers each with its count, and 1 if it waits, 2 if it was left by the dead (a time of 0 says so, too); then what
-- was deleted meanwhile, and what somebody settled while it waited.
local stream, times, group, me, waiting = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
local room, from, all = tonumber(ARGV[4]), ARGV[6], ARGV[7] == '1'
local found, gone, over, cursor, after = {}, {}, {}, '', -1
local function claim(id, count, kind)
  local entry = redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', count)[1]
  if entry then
    found[#found + 1] = {id, entry[2], count, kind}
  else
    redis.call('XACK', stream, group, id)
    gone[#gone + 1] = id
  end
  redis.call('ZREM', times, id)
end
if not all and room > 0 then
  local due = redis.call('ZRANGEBYSCORE', times, '-inf', now, 'WITHSCORES', 'LIMIT', 0, room)
  for index = 1, #due, 2 do
    local id = due[index]
    local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
    if pending and pending[2] == waiting then
      claim(id, pending[4], tonumber(due[index + 1]) == 0 and 2 or 0)
    else
      redis.call('ZREM', times, id)
      over[#over + 1] = id
    end
  end
end
if from ~= '' then
  local batch = 200
  for number, pending in ipairs(redis.call('XPENDING', stream, group, 'IDLE', ARGV[5], from, '+', batch)) do
    local id = pending[1]
    if #found >= room then
      cursor = id
      break
    end
    local due = pending[2] == waiting and redis.call('ZSCORE', times, id)
    if all and due and tonumber(due) > now then
      local entry = redis.call('XRANGE', stream, id, id)[1]
      if entry then
        found[#found + 1] = {id, entry[2], pending[4], 1}
      end
    elseif all or not due then
      local left = pending[2] ~= waiting or due and tonumber(due) == 0
      claim(id, pending[4], left and 2 or 0)
    end
    if number == batch then
      cursor = '(' .. id
    end
  end
end
local first = redis.call('ZRANGE', times, 0, 0, 'WITHSCORES')
if first[2] then
  after = math.max(0, tonumber(first[2]) - now)
end
return {found, cursor, after, gone, over}
"""
)

RENEW: Final = """
-- KEYS stream; ARGV group, consumer, id...
-- Keep these; answers those that are not this consumer's any more, though they are still there to be handled.
local stream, group, me = KEYS[1], ARGV[1], ARGV[2]
local command, lost = {'XCLAIM', stream, group, me, 0}, {}
for index = 3, #ARGV do
  local id = ARGV[index]
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1, me)
  if pending[1] then
    command[#command + 1] = id
  elseif #redis.call('XRANGE', stream, id, id) > 0 then
    lost[#lost + 1] = id
  end
end
if #command > 5 then
  command[#command + 1] = 'JUSTID'
  redis.call(unpack(command))
end
return lost
"""

COUNT: Final = """
-- KEYS stream; ARGV group, consumer, then for each an id and how often it will have been handed over, with this time
-- Answers those that are not this consumer's any more, though they are still there to be handled.
local stream, group, me = KEYS[1], ARGV[1], ARGV[2]
local lost = {}
for index = 3, #ARGV, 2 do
  local id = ARGV[index]
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1, me)
  if pending[1] then
    redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', ARGV[index + 1], 'JUSTID')
  elseif #redis.call('XRANGE', stream, id, id) > 0 then
    lost[#lost + 1] = id
  end
end
return lost
"""

POSTPONE: Final = (
    _NOW
    + """
-- KEYS stream, times; ARGV group, consumer, waiting, then for each an id, how often it was handed over, and
-- milliseconds, or -1: at once, as left by the dead
local stream, times, group, me, waiting = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
for index = 4, #ARGV, 3 do
  local id, delay = ARGV[index], tonumber(ARGV[index + 2])
  if redis.call('XPENDING', stream, group, id, id, 1, me)[1] then
    redis.call('ZADD', times, delay < 0 and 0 or now + delay, id)
    redis.call('XCLAIM', stream, group, waiting, 0, id, 'RETRYCOUNT', ARGV[index + 1], 'JUSTID')
  end
end
return 1
"""
)

BURY: Final = """
-- KEYS stream, dead letters; ARGV group, consumer, id, again, sure, field and value...
-- `sure`: not done yet as far as we know, so that one which somebody deleted from the stream is kept all the same.
local stream, dead, group, me, id = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
local owner = pending[1] and pending[1][2]
if owner and owner ~= me or not owner and ARGV[5] ~= '1' then
  return 0
end
redis.call('XADD', dead, '*', unpack(ARGV, 6))
redis.call('XACK', stream, group, id)
if ARGV[4] == '1' then
  redis.call('XDEL', stream, id)
end
return 1
"""

LEAVE: Final = """
-- KEYS stream; ARGV group, consumer, waiting, idle
-- Delete this consumer, and those that were not seen for `idle` milliseconds; never one that has something pending.
for _, entry in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local about = {}
  for index = 1, #entry, 2 do
    about[entry[index]] = entry[index + 1]
  end
  local over = about.name == ARGV[2] or about.idle > tonumber(ARGV[4])
  if about.pending == 0 and about.name ~= ARGV[3] and over then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], about.name)
  end
end
return 1
"""

LEASE: Final = """
-- KEYS lease; ARGV consumer, milliseconds. 1: still this consumer's, 2: from now on, 0: another's
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return 1
elseif owner then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 2
"""

RELEASE: Final = """
-- KEYS lease; ARGV consumer
return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0
"""

TRIM: Final = """
-- KEYS stream; ARGV length
-- Delete the oldest beyond that length, as far as every group has read and settled them; at most 1000 at a time.
local function less(left, right)
  local function parts(id)
    local time, number = string.match(id, '^(%d+)-(%d+)$')
    return #time, time, #number, number
  end
  local a, b, c, d = parts(left)
  local e, f, g, h = parts(right)
  if a ~= e then return a < e end
  if b ~= f then return b < f end
  if c ~= g then return c < g end
  return d < h
end
local stream = KEYS[1]
local excess = redis.call('XLEN', stream) - tonumber(ARGV[1])
if excess <= 0 then
  return 0
end
local groups = redis.call('XINFO', 'GROUPS', stream)
local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', math.min(excess, 1000) + 1)
local bound = oldest[#oldest][1]
for _, group in ipairs(groups) do
  local about = {}
  for index = 1, #group, 2 do
    about[group[index]] = group[index + 1]
  end
  local safe = about['last-delivered-id']
  if about.pending > 0 then
    safe = redis.call('XPENDING', stream, about.name)[2]
  end
  if less(safe, bound) then
    bound = safe
  end
end
if #groups == 0 then
  return 0
end
return redis.call('XTRIM', stream, 'MINID', '=', bound)
"""
