#!lua flags=allow-oom
-- Take the lease of a shard if it is free, ours already, or still exactly as the caller has watched it stand still.
--
-- KEYS  1 auction:lease:{k}
-- ARGV  1 holder   2 the epoch and 3 the beat that were seen, or -1
-- Returns {holder, epoch, beat} as it now stands: ours if the claim succeeded
--
-- No TTL decides: a stepping server clock turned a ten-second lease into an hour. Whether a holder is dead is judged by
-- the taker, on its own monotonic clock, by a beat that does not move; and even a wrong judgement is safe, because
-- the epoch rises with every claim and the commit of the old holder is refused.
local seen = redis.pcall('HMGET', KEYS[1], 'holder', 'epoch', 'beat')
if seen.err then
  redis.call('DEL', KEYS[1])
end
local holder, epoch, beat = seen[1] or '', seen[2] or '0', seen[3] or '0'
local function is_count(text)
  return #text <= 15 and string.match(text, '^%d+$')
end
if seen.err or not is_count(epoch) then
  -- Nobody can hold a lease whose epoch is lost, and no epoch was ever given out that is as high as the time.
  holder, epoch = '', redis.call('TIME')[1]
  redis.call('HSET', KEYS[1], 'epoch', epoch)
end
if holder == '' or holder == ARGV[1] or (epoch == ARGV[2] and beat == ARGV[3]) or not is_count(beat) then
  holder, beat = ARGV[1], '0'
  epoch = tostring(redis.call('HINCRBY', KEYS[1], 'epoch', 1))
  redis.call('HSET', KEYS[1], 'holder', holder, 'beat', beat)
end
return {holder, epoch, beat}
