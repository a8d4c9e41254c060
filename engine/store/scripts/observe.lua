#!lua flags=no-writes
-- Read auctions as they are kept, and where the audit log stands in the same instant.
--
-- KEYS  1 auction:cursor:{k}   2 auction:deadlines:{k}   3 auction:paused:{k}   4 auction:closed:{k}
--       5.. auction:timer:{k}:<id>
-- ARGV  1 number of fields to read   then the fields, then the ids, in the order of the keys
-- Returns {audit seq, audit hash, last stamp, then for each auction: {live score, paused score, closed score, values...}}
--         In a sorted set of another type nothing stands; of a timer of another type there is only what Redis says of it.
local head = redis.call('HMGET', KEYS[1], 'seq', 'hash', 'last_at')
local answer = {head[1] or '0', head[2] or '', head[3] or '0'}
local fields = tonumber(ARGV[1])
for i = 5, #KEYS do
  local id = ARGV[1 + fields + i - 4]
  local row = redis.pcall('HMGET', KEYS[i], unpack(ARGV, 2, 1 + fields))
  row = row.err and {row.err} or row
  for set = 4, 2, -1 do
    local score = redis.pcall('ZSCORE', KEYS[set], id)
    table.insert(row, 1, type(score) == 'string' and score)
  end
  answer[#answer + 1] = row
end
return answer
