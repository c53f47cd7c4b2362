-- Takes a worker that holds no lease any more out of a lane. May be repeated.
-- KEYS  1 lane
-- ARGV  1 worker
-- Returns 1 when it is gone, 0 when deliveries of its are pending still.
local worker = ARGV[1]
local size = string.match(redis.call('HGET', key('slots'), worker) or '', '(%d+):')
redis.call('HDEL', key('slots'), worker)
if size then
  redis.call('HSET', key('meta'), 'la', math.max(0, look_ahead() - 2 * tonumber(size)))
end
local pending = redis.call('XPENDING', key('stream'), GROUP, '-', '+', 1, worker)
if #pending > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', key('stream'), GROUP, worker)
return 1
