-- Queues delayed jobs whose time has come, and feeds those that waited for the time of a gate.
-- KEYS  1 lane
-- ARGV  1 most jobs
-- Returns how many were queued.
local now = now_ms()
local due = redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(due) do
  redis.call('ZREM', key('delayed'), id)
  local job = read_job(id)
  if job.state == DELAYED then queue_again(id, job, now) end
end
-- Workers hear of what is fed.
if #due > 0 then
  if feed(now) == 0 then hint('w') end
elseif redis.call('ZRANGEBYSCORE', key('shut'), '-inf', now, 'LIMIT', 0, 1)[1] then
  feed(now)
end
settle()
return #due
