-- Takes a worker that holds no lease any more out of a lane. May be repeated.
-- KEYS  1 lane
-- ARGV  1 worker
-- Returns 1 when it is gone, 0 when deliveries of its are pending still.
local worker = ARGV[1]
redis.call('HDEL', key('slots'), worker)
count_slots(now_ms(), worker)
local pending = redis.call('XPENDING', key('stream'), GROUP, '-', '+', 1, worker)
if #pending > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', key('stream'), GROUP, worker)
return 1
