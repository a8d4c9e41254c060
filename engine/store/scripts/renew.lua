#!lua flags=allow-oom
-- Beat once for a lease.
--
-- KEYS  1 auction:lease:{k}
-- ARGV  1 holder   2 epoch
-- Returns 1, or 0 if the lease is no longer the caller's
local seen = redis.pcall('HMGET', KEYS[1], 'holder', 'epoch')
if seen[1] ~= ARGV[1] or seen[2] ~= ARGV[2] then
  return 0
end
-- A beat that cannot be raised is no sign of life: the lease is lost, and claimed anew.
return type(redis.pcall('HINCRBY', KEYS[1], 'beat', 1)) == 'number' and 1 or 0
