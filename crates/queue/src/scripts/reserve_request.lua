-- Makes a tenant's request id stand for a job, unless it stands for one already.
-- KEYS  1 the request id's key
-- ARGV  1 job id and content hash
-- Returns what it stands for now: that value, or the earlier one.
local earlier = redis.call('GET', KEYS[1])
if earlier then return earlier end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
