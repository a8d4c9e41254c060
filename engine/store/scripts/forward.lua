#!lua flags=allow-oom
-- Move the forwarder's cursor behind entries that were delivered, filtered out or put aside. One atomic step.
--
-- KEYS  1 auction:forwarder:{k}   2 auction:undelivered:{k}
-- ARGV  1 epoch of the forwarder's lease   2 cursor it builds on   3 cursor it leads to   4 entries of the lane it passes
--       5 length of the stream of what was put aside; then, if the last entry is put aside, its fields and values
-- Returns 1; 0 if the lease or the cursor is not where the caller thought, and nothing is written
--
-- allow-oom: what was delivered must not be delivered again and again while the server is out of memory.
local seen = redis.pcall('HMGET', KEYS[1], 'epoch', 'cursor')
if seen[1] ~= ARGV[1] then
  return 0
end
-- The answer of the first try was lost: done is done.
if seen[2] == ARGV[3] then
  return 1
end
if seen[2] ~= ARGV[2] then
  return 0
end
if #ARGV > 5 then
  -- Redis does not take back what was written before an error, and what is no stream holds nothing that was put aside.
  if type(redis.pcall('XLEN', KEYS[2])) == 'table' then
    redis.call('DEL', KEYS[2])
  end
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', unpack(ARGV, 6))
end
redis.call('HSET', KEYS[1], 'cursor', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'passed', ARGV[4])
return 1
