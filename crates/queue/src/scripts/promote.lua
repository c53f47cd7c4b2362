-- Queues delayed jobs whose time has come.
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
if #due > 0 and feed(now) == 0 then hint('w') end
settle()
return #due
