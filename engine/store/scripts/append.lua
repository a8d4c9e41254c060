#!lua
-- Append events to the intake of one shard: stamp their arrival, recognise repetitions. One atomic step.
--
-- KEYS  1 auction:events:{k}   2 auction:cursor:{k}   3 auction:parked:{k}   4 auction:attendance:{k}
--       5.. auction:seen:{k}:<id>, in the order of the drafts: of each its event id, the same beside its subject, further ids
-- ARGV  1 est: the caller's estimate of the auction clock, ms
--       2 bound of the stamp around est, ms
--       3 command id: the same one again repeats the answer
--       4 how long a repetition is recognised, ms
--       5 bound of the stream's length
--       6 bound of the commands in troubleshooting
--       7 the gateway that calls, or "" if it is none
--       8 how long no gateway may write before that is an outage, ms   9 by how much an outage extends, ms, or 0
--      10 1 for a command of a person or of ours: it is never refused for those in troubleshooting, or 0
--      11 number of drafts, 0 for a mere beat; then for each: event id, subject, number of its keys, body
-- Returns {"OK", stamp, then for each draft: "accepted" or "duplicate", its arrival}
--         {"FULL", length} or {"TROUBLED", commands in troubleshooting}, and nothing is added
--         {"DAMAGED", key}: the intake or the cursor is of another type, and nothing is added
--
-- The stamp never goes back (last_at), and a server whose clock steps can falsify it by no more than the bound.
-- Not allowed when the server is out of memory: a bid that cannot be kept must not be promised.
local events, cursor = KEYS[1], KEYS[2]
local est, bound = tonumber(ARGV[1]), tonumber(ARGV[2])
local command_id, seen_ms, length_max = ARGV[3], ARGV[4], tonumber(ARGV[5])
local troubled_max, urgent, drafts = tonumber(ARGV[6]), ARGV[10] == '1', tonumber(ARGV[11])
local attendance, attendant, outage_ms, extension_ms = KEYS[4], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])

local head = redis.pcall('HMGET', cursor, 'last_at', 'offset')
if head.err then
  return {'DAMAGED', cursor}
end
local length, troubled = redis.pcall('XLEN', events), redis.pcall('ZCARD', KEYS[3])
if type(length) == 'table' then
  return {'DAMAGED', events}
end
troubled = type(troubled) == 'number' and troubled or 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000) + (tonumber(head[2]) or 0)
now = math.max(est - bound, math.min(est + bound, now))
now = math.max(tonumber(head[1]) or 0, now)
local stamp = string.format('%.0f', now)

-- A gateway that can write here proves that producers could, unless they would be refused for a bound. If none did for too
-- long, that is told before anything that is appended now: whoever folds the intake learns of the outage before it meets an
-- event that came after it.
if attendant ~= '' and length < length_max and troubled < troubled_max then
  local seen = redis.pcall('HGET', attendance, 'at')
  if type(seen) == 'table' then
    redis.call('DEL', attendance)
  end
  seen = type(seen) == 'string' and #seen <= 15 and string.match(seen, '^%d+$')
  if seen and extension_ms > 0 and now - tonumber(seen) > outage_ms then
    local name = 'outage-' .. seen .. '-' .. stamp
    local id = redis.call('XADD', events, '*', 'at', stamp, 'id', name, 'body', string.format(
      '{"type":"service.outage.observed","auction_id":null,"offer_id":null,"trace_id":"%s","correlation_id":"%s",'
      .. '"actor":{"type":"system","id":"%s"},"reply_to":null,"occurred_at":null,'
      .. '"detail":{"since":%s,"until":%s,"extension_ms":%.0f}}', name, name, attendant, seen, stamp, extension_ms))
    redis.call('HSETNX', attendance, 'since', seen)
    redis.call('HSET', attendance, 'outage', id)
    redis.call('HSET', cursor, 'last_at', stamp)
  end
  -- A request that was late does not take back what a later one has shown.
  if (seen and now > tonumber(seen)) or (not seen and drafts == 0) then
    redis.call('HSET', attendance, 'at', stamp)
  end
end

local function mark_in(key)
  local mark = redis.pcall('GET', key)
  return type(mark) == 'string' and string.match(mark, '^%d+ %d+ %S+.*$')
end

local answer = {'OK', stamp}
local key, arg, added = 5, 12, false
for n = 1, drafts do
  local event_id, subject, ids, body = ARGV[arg], ARGV[arg + 1], tonumber(ARGV[arg + 2]), ARGV[arg + 3]
  -- A mark is "<arrival> <place in the call> <command id> <subject>"; one without a subject was written by a version that
  -- had none. Where the id is that of an event about something else, ours is marked beside it.
  local own, mark = key, mark_in(KEYS[key])
  local about = mark and string.match(mark, '^%d+ %d+ %S+ (.*)$')
  if about and about ~= subject then
    own, mark = key + 1, mark_in(KEYS[key + 1])
  end
  for i = key + 2, key + ids - 1 do
    mark = mark or mark_in(KEYS[i])
  end
  if mark then
    -- Our own earlier try was an acceptance, and stays one.
    local at, by = string.match(mark, '^(%d+) (%d+ %S+)')
    answer[#answer + 1] = by == n .. ' ' .. command_id and 'accepted' or 'duplicate'
    answer[#answer + 1] = at
  else
    -- Looked at only when something is to be added: the call that took the last places can still be repeated.
    if not added and length + drafts - n + 1 > length_max then
      return {'FULL', tostring(length)}
    end
    if not added and not urgent and troubled >= troubled_max then
      return {'TROUBLED', tostring(troubled)}
    end
    redis.call('XADD', events, '*', 'at', stamp, 'id', event_id, 'body', body)
    local value = stamp .. ' ' .. n .. ' ' .. command_id .. ' ' .. subject
    redis.call('SET', KEYS[own], value, 'PX', seen_ms)
    for i = key + 2, key + ids - 1 do
      redis.call('SET', KEYS[i], value, 'PX', seen_ms)
    end
    answer[#answer + 1] = 'accepted'
    answer[#answer + 1] = stamp
    added = true
  end
  key, arg = key + ids, arg + 4
end
if added then
  redis.call('HSET', cursor, 'last_at', stamp)
end
return answer
