#!lua flags=allow-oom
-- Deliver one reply that the commit of a shard could not write, because its stream is in another slot. Repeating is harmless.
--
-- KEYS  1 auction:replies:<reply to>   2 auction:delivered:{...}:<shard>:<command id>, in the same slot
-- ARGV  1 id of the reply in auction:outbox:{k}   2 outcome   3 command id   4 body
--       5 length of a reply stream                6 how long a repetition is recognised, ms
-- Returns 1 if it was delivered now, 0 if it had been
--
-- allow-oom, as the commit that made the reply: what has been decided is told.
if redis.pcall('GET', KEYS[2]) == ARGV[1] then
  return 0
end
-- What is no stream is no answer that somebody could read.
if type(redis.pcall('XLEN', KEYS[1])) == 'table' then
  redis.call('DEL', KEYS[1])
end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], '*', 'outcome', ARGV[2], 'command_id', ARGV[3], 'body', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[6])
return 1
