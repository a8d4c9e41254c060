#!lua flags=allow-oom
-- What the webhook has not been offered yet: the entries of the event lane behind the forwarder's cursor.
--
-- KEYS  1 auction:forwarder:{k}   2 auction:updates:{k}
-- ARGV  1 epoch of the forwarder's lease   2 most entries to read   3 id of this call
-- Returns {"OK", how the cursor stands, cursor, entries lost, entries behind the cursor, the first of them}
--         {"FENCED", epoch}
--
-- How it stands: "begun" at the lane's end (there was none yet, or none that can be read), "back" (the lane ended before it), or "kept".
-- `passed` counts the lane's entries up to the cursor, and Redis counts all that were ever added; so what was trimmed
-- before it was read is known exactly. It is told once, and again to a repetition of the call: the first answer may be lost.
local forwarder, updates = KEYS[1], KEYS[2]
local seen = redis.pcall('HMGET', forwarder, 'epoch', 'cursor', 'passed', 'asked', 'standing', 'lost')
if (seen[1] or '0') ~= ARGV[1] then
  return {'FENCED', seen[1] or '0'}
end

local lane = {['entries-added'] = 0, ['length'] = 0, ['last-generated-id'] = '0-0'}
local is_kept = redis.call('TYPE', updates).ok == 'stream'
if is_kept then
  local info = redis.call('XINFO', 'STREAM', updates)
  for i = 1, #info, 2 do
    lane[info[i]] = info[i + 1]
  end
end
local added, last = lane['entries-added'], lane['last-generated-id']
local trimmed = added - lane['length']

local function is_before(one, other)
  local ms, seq = string.match(one, '(%d+)-(%d+)')
  local other_ms, other_seq = string.match(other, '(%d+)-(%d+)')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or (ms == other_ms and tonumber(seq) < tonumber(other_seq))
end

local standing, cursor, passed, lost = 'kept', seen[2], tonumber(seen[3]), 0
if not cursor or not passed or not string.match(cursor, '^%d+%-%d+$') then
  standing, cursor, passed = 'begun', last, added
elseif is_before(last, cursor) then
  standing, cursor, passed = 'back', last, added
elseif passed < trimmed then
  lost, passed = trimmed - passed, trimmed
elseif passed > added then
  -- The lane was made anew: all it holds is behind the cursor.
  passed = trimmed
end
if standing ~= 'kept' or passed ~= tonumber(seen[3]) then
  redis.call('HSET', forwarder, 'cursor', cursor, 'passed', string.format('%.0f', passed),
    'asked', ARGV[3], 'standing', standing, 'lost', string.format('%.0f', lost))
elseif seen[4] == ARGV[3] then
  standing, lost = seen[5], tonumber(seen[6])
end
local entries = is_kept and redis.call('XRANGE', updates, '(' .. cursor, '+', 'COUNT', ARGV[2]) or {}
return {'OK', standing, cursor, lost, added - passed, entries}
