#!lua flags=no-writes
-- Read the same fields of many timer hashes: one call for a page instead of one for each.
--
-- KEYS  auction:timer:{k}:<id>, ...
-- ARGV  the fields to read
-- Returns for each key the list of its values, in the order of ARGV; of one that is of another type only what Redis says of it
local rows = {}
for i, key in ipairs(KEYS) do
  local row = redis.pcall('HMGET', key, unpack(ARGV))
  rows[i] = row.err and {row.err} or row
end
return rows
