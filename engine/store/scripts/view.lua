#!lua flags=no-writes
-- Read one auction and the place in the event lane as of which it stands so.
--
-- KEYS  1 auction:timer:{k}:<id>   2 auction:updates:{k}
-- ARGV  the fields to read
-- Returns {stream id, then one value per field; if the key is of another type, only what Redis says of it}
local last = redis.pcall('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local row = redis.pcall('HMGET', KEYS[1], unpack(ARGV))
row = row.err and {row.err} or row
table.insert(row, 1, last and last[1] or '0-0')
return row
