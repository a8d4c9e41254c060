#!lua flags=no-writes
-- Read one auction and the place in the event lane as of which it stands so.
--
-- KEYS  1 auction:timer:{k}:<id>   2 auction:updates:{k}
-- ARGV  the fields to read
-- Returns {stream id, then one value per field}
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local row = redis.call('HMGET', KEYS[1], unpack(ARGV))
table.insert(row, 1, last and last[1] or '0-0')
return row
