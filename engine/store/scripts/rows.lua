#!lua flags=no-writes
-- Read the same fields of many timer hashes: one call for a page instead of one for each.
--
-- KEYS  auction:timer:{k}:<id>, ...
-- ARGV  the fields to read
-- Returns for each key the list of its values, in the order of ARGV
local rows = {}
for i, key in ipairs(KEYS) do
  rows[i] = redis.call('HMGET', key, unpack(ARGV))
end
return rows
