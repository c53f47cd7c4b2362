-- Gives a lane its number, the same one every time.
-- KEYS  1 the registry's lanes
-- ARGV  1 lane name
-- Returns the number.
local number = redis.call('HGET', KEYS[1], ARGV[1])
if number then return tonumber(number) end
number = redis.call('HINCRBY', KEYS[1], '#', 1)
redis.call('HSET', KEYS[1], ARGV[1], number)
return number
