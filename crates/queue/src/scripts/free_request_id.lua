-- Frees a request id, unless it stands for another job by now. May be repeated.
-- KEYS  1 the hash of request ids that has it
-- ARGV  1 its name there   2 the job that it is to stand for no more
-- Returns 1 when it was freed, 0 when it stands for another job or for none.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored or string.sub(stored, 1, 16) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
