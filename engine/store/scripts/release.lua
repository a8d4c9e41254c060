#!lua flags=allow-oom
-- Give a lease back, so that the next engine need not wait. The epoch stays: it must never be given out twice.
--
-- KEYS  1 auction:lease:{k}
-- ARGV  1 holder   2 epoch
-- Returns 1, or 0 if the lease was no longer the caller's
local seen = redis.pcall('HMGET', KEYS[1], 'holder', 'epoch')
if seen[1] ~= ARGV[1] or seen[2] ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], 'holder', '')
return 1
