-- Queues delayed jobs whose time has come.
-- KEYS  1 lane
-- ARGV  1 most jobs
-- Returns how many were queued.
local now = now_ms()
local due = redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(due) do
  redis.call('ZREM', key('delayed'), id)
  if redis.call('HGET', job_key(id), 'st') == DELAYED then queue_again(id, now) end
end
if #due > 0 and feed(look_ahead()) == 0 then hint('w') end
settle()
return #due
