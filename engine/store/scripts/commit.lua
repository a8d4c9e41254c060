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
-- Returns {"OK", stamp} | {"FENCED", epoch} | {"EARLY", ms} | {"UNDRAINED"} | {"UNATTENDED", when a gateway last wrote}
--         {"SUPERSEDED", what}, and if it is a hash that is not of its version, also which of the guards, and that version
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

local head = redis.call('HMGET', cursor, 'intake', 'seq', 'last_at', 'offset', 'commit', 'commit_at', 'hash')
if head[5] == ARGV[2] then
  return {'OK', head[6]}
end
-- Epoch and holder: a failover that loses a claim gives its epoch out again, and the first to get it may not know yet.
local held = redis.call('HMGET', lease, 'epoch', 'holder')
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

local arg = 19
for n = 1, tonumber(ARGV[18]) do
  local key = KEYS[tonumber(ARGV[arg])]
  local version = redis.call('HGET', key, 'version') or '0'
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
local attended = redis.call('HMGET', attendance, 'at', 'outage', 'since')
local closes_at = tonumber(ARGV[15])
if closes_at > 0 and now < closes_at + tonumber(ARGV[17]) then
  if attended[1] and tonumber(attended[1]) < closes_at - tonumber(ARGV[16]) then
    return {'UNATTENDED', attended[1]}
  end
  if attended[2] and closes_at > tonumber(attended[3]) and is_before(ARGV[8], attended[2]) then
    return {'UNDRAINED'}
  end
end

local stamp = string.format('%.0f', now)
local retention, updates_max, replies_max, seen_ms = ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local count = #ARGV
while arg <= count do
  local op, n = ARGV[arg], tonumber(ARGV[arg + 1])
  local a, z = arg + 2, arg + 1 + n
  if op == 'A' then
    redis.call('XADD', audit, '*', unpack(ARGV, a, z))
  elseif op == 'U' then
    redis.call('XADD', updates, 'MAXLEN', '~', updates_max, '*',
      'type', ARGV[a], 'auction_id', ARGV[a + 1], 'version', ARGV[a + 2], 'body', ARGV[a + 3])
  elseif op == 'T' then
    redis.call('HSET', KEYS[tonumber(ARGV[a])], unpack(ARGV, a + 1, z))
  elseif op == 'L' then
    redis.call('ZADD', deadlines, ARGV[a + 1], ARGV[a])
    redis.call('ZREM', paused, ARGV[a])
    redis.call('ZREM', closed, ARGV[a])
  elseif op == 'P' then
    redis.call('ZREM', deadlines, ARGV[a])
    redis.call('ZREM', closed, ARGV[a])
    redis.call('ZADD', paused, ARGV[a + 1], ARGV[a])
  elseif op == 'C' then
    redis.call('ZREM', deadlines, ARGV[a])
    redis.call('ZREM', paused, ARGV[a])
    redis.call('ZADD', closed, ARGV[a + 1], ARGV[a])
    redis.call('PEXPIRE', KEYS[tonumber(ARGV[a + 2])], retention)
  elseif op == 'Z' then
    redis.call('ZREM', deadlines, ARGV[a])
    redis.call('ZREM', paused, ARGV[a])
    redis.call('ZREM', closed, ARGV[a])
  elseif op == 'R' then
    local key = KEYS[tonumber(ARGV[a])]
    redis.call('XADD', key, 'MAXLEN', '~', replies_max, '*',
      'outcome', ARGV[a + 1], 'command_id', ARGV[a + 2], 'body', ARGV[a + 3])
    redis.call('PEXPIRE', key, seen_ms)
  elseif op == 'D' then
    redis.call('XADD', KEYS[tonumber(ARGV[a])], '*',
      'reply_to', ARGV[a + 1], 'outcome', ARGV[a + 2], 'command_id', ARGV[a + 3], 'body', ARGV[a + 4])
  elseif op == 'Q' then
    local id, otherwise = ARGV[a], ARGV[a + 3]
    if otherwise ~= '' and redis.call('HEXISTS', troubleshooting, id) == 1 then
      id = otherwise
    end
    redis.call('HSET', troubleshooting, id, ARGV[a + 2])
    redis.call('ZADD', parked, ARGV[a + 1], id)
  elseif op == 'X' then
    redis.call('HDEL', troubleshooting, ARGV[a])
    redis.call('ZREM', parked, ARGV[a])
  elseif op == 'E' then
    redis.call('XADD', events, '*', 'at', stamp, 'id', ARGV[a], 'body', ARGV[a + 1],
      'attempts', ARGV[a + 2], 'first_seen_at', ARGV[a + 3])
  elseif op == 'K' then
    redis.call('SET', KEYS[tonumber(ARGV[a])], ARGV[a + 1], 'PX', seen_ms)
  elseif op == 'S' then
    redis.call('HSET', cursor, 'offset', ARGV[a])
    redis.call('HINCRBY', cursor, 'corrections', 1)
  elseif op == 'O' then
    local key = KEYS[tonumber(ARGV[a])]
    if ARGV[a + 2] ~= '1' then
      redis.call('SET', key, ARGV[a + 1])
    else
      -- Put up again, the offer belongs to a later auction: an earlier one that closes must not take it back.
      local held, value = redis.call('GET', key) or ARGV[a + 1], ARGV[a + 1]
      if held == value or string.sub(held, 1, #value + 1) == value .. ' ' then
        redis.call('SET', key, held, 'PX', retention)
      end
    end
  end
  arg = z + 1
end

if attended[2] and not is_before(ARGV[8], attended[2]) then
  redis.call('HDEL', attendance, 'outage', 'since')
end
redis.call('HSET', cursor, 'intake', ARGV[8], 'seq', ARGV[9], 'hash', ARGV[10],
  'last_at', stamp, 'commit', ARGV[2], 'commit_at', stamp)
return {'OK', stamp}
