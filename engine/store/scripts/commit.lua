#!lua flags=allow-oom
-- Commit a batch of one shard: state, deadlines, audit, announcements, replies and the intake cursor in one atomic step.
-- It knows no business rule; see `Batch` and the operations in engine/store/protocol.py.
--
-- KEYS  1 auction:lease:{k}      2 auction:cursor:{k}   3 auction:events:{k}   4 auction:deadlines:{k}
--       5 auction:paused:{k}     6 auction:closed:{k}   7 auction:audit:{k}    8 auction:updates:{k}
--       9 auction:troubleshooting:{k}                  10 auction:parked:{k}   11 auction:attendance:{k}
--       12.. timer hashes, reply streams, offer and command keys: ARGV names them by index
-- ARGV  1 epoch and holder       2 commit id            3 est, ms              4 bound of the stamp around est, ms
--       5 intake id it builds on 6 audit seq and hash it builds on             7 due_at, ms, or 0
--       8 intake id it leads to  9 audit seq            10 audit hash
--      11 retention of closed auctions, ms             12 length of the event lane  13 length of a reply stream
--      14 how long a repetition is recognised, ms
--      15 latest end among the closes, ms, or 0        16 how long no gateway may write before that is an outage, ms
--      17 how long a close is held for an outage, ms   18 number of version guards; then for each: key index, version
--      then the operations: letter, number of arguments, arguments
--        T key n   field, value, ...      write fields of a timer hash
--        L id, score                      live: deadline
--        P id, score                      paused: no deadline
--        C id, score, key                 closed: no deadline, hash kept for the retention
--        Z id                             stands in none of the three
--        A field, value, ...              audit record
--        U type, id, version, body        event lane
--        R key, outcome, command id, body reply
--        D key, reply to, outcome, command id, body   reply that is to be delivered to another slot
--        Q command id, first seen at, body, id   into troubleshooting; under the last id, if any, where the first is taken
--        X command id                     out of troubleshooting
--        E id, body, attempts, first seen at  end of the intake, stamped with this commit
--        K key, body                      outcome of a command
--        O key, value, forget             offer binding
--        S offset, ms                     what is added to TIME from the next stamp on
-- Returns {"OK", stamp, then each key that was begun anew} | {"FENCED", epoch} | {"EARLY", ms} | {"UNDRAINED"}
--         {"UNATTENDED", when a gateway last wrote}
--         {"SUPERSEDED", what}, and if it is a hash that is not of its version, also which of the guards, and that version
--         {"DAMAGED", key}: a key of another type without which nothing can be committed
--
-- Redis does not take back what a script wrote before an error. So whatever a hand may have written over a key, no write
-- here fails: what cannot be begun anew is looked at before the first write, and the rest is deleted where it is written.
--
-- allow-oom: a close must commit when the server is out of memory; what it adds is bounded, what it frees is not less.
local lease, cursor, events, deadlines, paused, closed = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local audit, updates, troubleshooting, parked, attendance = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]

local function is_before(one, other)
  local ms, seq = string.match(one, '(%d+)-(%d+)')
  local other_ms, other_seq = string.match(other, '(%d+)-(%d+)')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or (ms == other_ms and tonumber(seq) < tonumber(other_seq))
end

local begun_anew = {}
local function write(command, key, ...)
  local answer = redis.pcall(command, key, ...)
  if type(answer) == 'table' and answer.err then
    if not string.find(answer.err, 'WRONGTYPE', 1, true) then
      error(answer)
    end
    redis.call('DEL', key)
    begun_anew[#begun_anew + 1] = key
    redis.call(command, key, ...)
  end
end

local head = redis.pcall('HMGET', cursor, 'intake', 'seq', 'last_at', 'offset', 'commit', 'commit_at', 'hash', 'corrections')
if head.err then
  return {'DAMAGED', cursor}
end
if head[5] == ARGV[2] then
  return {'OK', head[6]}
end
-- Epoch and holder: a failover that loses a claim gives its epoch out again, and the first to get it may not know yet.
local held = redis.pcall('HMGET', lease, 'epoch', 'holder')
local epoch = held[1] or '0'
if epoch .. ' ' .. (held[2] or '') ~= ARGV[1] then
  return {'FENCED', epoch}
end
if (head[1] or '0-0') ~= ARGV[5] then
  return {'SUPERSEDED', 'cursor ' .. (head[1] or '0-0')}
end
if (head[2] or '0') .. ' ' .. (head[7] or string.rep('0', 64)) ~= ARGV[6] then
  return {'SUPERSEDED', 'audit ' .. (head[2] or '0')}
end
for _, log in ipairs({audit, events}) do
  if type(redis.pcall('XLEN', log)) == 'table' then
    return {'DAMAGED', log}
  end
end

local arg = 19
for n = 1, tonumber(ARGV[18]) do
  local key = KEYS[tonumber(ARGV[arg])]
  local version = redis.pcall('HGET', key, 'version') or '0'
  version = type(version) == 'string' and version or 'of another type'
  if version ~= ARGV[arg + 1] then
    return {'SUPERSEDED', key .. ' version ' .. version, n, version}
  end
  arg = arg + 2
end

local est, bound = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000) + (tonumber(head[4]) or 0)
now = math.max(est - bound, math.min(est + bound, now))
now = math.max(tonumber(head[3]) or 0, now)

-- The close guard (architecture section 5): the authority agrees that it is time, and no bid in time waits unapplied.
-- Arrivals never go back along the stream, so the first unapplied entry has the earliest one.
local due_at = tonumber(ARGV[7])
if due_at > 0 then
  if now < due_at then
    return {'EARLY', string.format('%.0f', due_at - now)}
  end
  local waiting = redis.call('XRANGE', events, '(' .. ARGV[8], '+', 'COUNT', 1)[1]
  if waiting then
    local arrival = waiting[2][1] == 'at' and tonumber(waiting[2][2]) or nil
    if not arrival or arrival < due_at then
      return {'UNDRAINED'}
    end
  end
end

-- The outage guard (requirement B8): producers could reach us up to the end, and every outage before it has been applied.
-- Held for a while only: after that an extension could not help anybody.
local attended = redis.pcall('HMGET', attendance, 'at', 'outage', 'since')
local attended_at, outage = tonumber(attended[1]), attended[2] and string.match(attended[2], '^%d+%-%d+$')
local outage_waits = outage and is_before(ARGV[8], outage)
local closes_at = tonumber(ARGV[15])
if closes_at > 0 and now < closes_at + tonumber(ARGV[17]) then
  if attended_at and attended_at < closes_at - tonumber(ARGV[16]) then
    return {'UNATTENDED', string.format('%.0f', attended_at)}
  end
  if outage_waits and closes_at > (tonumber(attended[3]) or 0) then
    return {'UNDRAINED'}
  end
end

local stamp = string.format('%.0f', now)
local retention, updates_max, replies_max, seen_ms = ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local corrections = tonumber(head[8]) or 0
local count = #ARGV
while arg <= count do
  local op, n = ARGV[arg], tonumber(ARGV[arg + 1])
  local a, z = arg + 2, arg + 1 + n
  if op == 'A' then
    -- The records come first (engine/store/redis.py), so one that is refused, say at the end of all ids, is so before any write.
    if type(redis.pcall('XADD', audit, '*', unpack(ARGV, a, z))) == 'table' then
      return {'DAMAGED', audit}
    end
  elseif op == 'U' then
    write('XADD', updates, 'MAXLEN', '~', updates_max, '*',
      'type', ARGV[a], 'auction_id', ARGV[a + 1], 'version', ARGV[a + 2], 'body', ARGV[a + 3])
  elseif op == 'T' then
    write('HSET', KEYS[tonumber(ARGV[a])], unpack(ARGV, a + 1, z))
  elseif op == 'L' then
    write('ZADD', deadlines, ARGV[a + 1], ARGV[a])
    write('ZREM', paused, ARGV[a])
    write('ZREM', closed, ARGV[a])
  elseif op == 'P' then
    write('ZREM', deadlines, ARGV[a])
    write('ZREM', closed, ARGV[a])
    write('ZADD', paused, ARGV[a + 1], ARGV[a])
  elseif op == 'C' then
    write('ZREM', deadlines, ARGV[a])
    write('ZREM', paused, ARGV[a])
    write('ZADD', closed, ARGV[a + 1], ARGV[a])
    redis.call('PEXPIRE', KEYS[tonumber(ARGV[a + 2])], retention)
  elseif op == 'Z' then
    write('ZREM', deadlines, ARGV[a])
    write('ZREM', paused, ARGV[a])
    write('ZREM', closed, ARGV[a])
  elseif op == 'R' then
    local key = KEYS[tonumber(ARGV[a])]
    write('XADD', key, 'MAXLEN', '~', replies_max, '*',
      'outcome', ARGV[a + 1], 'command_id', ARGV[a + 2], 'body', ARGV[a + 3])
    redis.call('PEXPIRE', key, seen_ms)
  elseif op == 'D' then
    write('XADD', KEYS[tonumber(ARGV[a])], '*',
      'reply_to', ARGV[a + 1], 'outcome', ARGV[a + 2], 'command_id', ARGV[a + 3], 'body', ARGV[a + 4])
  elseif op == 'Q' then
    local id, otherwise = ARGV[a], ARGV[a + 3]
    if otherwise ~= '' and redis.pcall('HEXISTS', troubleshooting, id) == 1 then
      id = otherwise
    end
    write('HSET', troubleshooting, id, ARGV[a + 2])
    write('ZADD', parked, ARGV[a + 1], id)
  elseif op == 'X' then
    write('HDEL', troubleshooting, ARGV[a])
    write('ZREM', parked, ARGV[a])
  elseif op == 'E' then
    redis.call('XADD', events, '*', 'at', stamp, 'id', ARGV[a], 'body', ARGV[a + 1],
      'attempts', ARGV[a + 2], 'first_seen_at', ARGV[a + 3])
  elseif op == 'K' then
    redis.call('SET', KEYS[tonumber(ARGV[a])], ARGV[a + 1], 'PX', seen_ms)
  elseif op == 'S' then
    corrections = corrections + 1
    redis.call('HSET', cursor, 'offset', ARGV[a], 'corrections', string.format('%.0f', corrections))
  elseif op == 'O' then
    local key = KEYS[tonumber(ARGV[a])]
    if ARGV[a + 2] ~= '1' then
      redis.call('SET', key, ARGV[a + 1])
    else
      -- Put up again, the offer belongs to a later auction: an earlier one that closes must not take it back.
      local held, value = redis.pcall('GET', key), ARGV[a + 1]
      held = type(held) == 'string' and held or value
      if held == value or string.sub(held, 1, #value + 1) == value .. ' ' then
        redis.call('SET', key, held, 'PX', retention)
      end
    end
  end
  arg = z + 1
end

if outage and not outage_waits then
  redis.call('HDEL', attendance, 'outage', 'since')
end
redis.call('HSET', cursor, 'intake', ARGV[8], 'seq', ARGV[9], 'hash', ARGV[10],
  'last_at', stamp, 'commit', ARGV[2], 'commit_at', stamp)
return {'OK', stamp, unpack(begun_anew)}
