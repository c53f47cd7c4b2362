-- Changes a setting and gives the change a version, by which lanes know the newest.
-- KEYS  1 the registry's settings
-- ARGV  1 name   2 value, empty to take it away
-- Returns the version.
local version = redis.call('HINCRBY', KEYS[1], '#', 1)
redis.call('HSET', KEYS[1], ARGV[1], version .. ':' .. ARGV[2])
return version
