-- Ends jobs that wait or are in a batch and whose deadline has passed. Other running ones are told by their worker's heartbeat.
-- KEYS  1 lane
-- ARGV  1 most jobs
-- Returns how many deadlines had passed.
local now = now_ms()
local passed = redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(passed) do
  redis.call('ZREM', key('deadlines'), id)
  local job = read_job(id)
  if job.state == QUEUED or job.state == DELAYED then
    stop_waiting(id, job, now)
    finish_job(id, job, EXPIRED, now)
  elseif job.batch then
    leave_batch(id, job.batch)
    finish_job(id, job, EXPIRED, now)
  end
end
settle()
return #passed
