-- Takes a worker that holds no lease any more out of a lane. May be repeated.
-- KEYS  1 lane
-- ARGV  1 worker
-- Returns 1 when it is gone, 0 when deliveries of its are pending still.
local worker = ARGV[1]
-- Its places end now, and it goes as one that died does: at once, or when its deliveries have been taken back.
redis.call('HSET', key('slots'), worker, '0:0:0:')
count_slots(now_ms(), worker)
return 1 - redis.call('HEXISTS', key('slots'), worker)
