-- Takes running jobs back whose leases have run out: each counts a loss, and is queued again or fails as poison.
-- KEYS  1 lane
-- ARGV  1 most jobs   2 losses that make poison   3 how the attempt ended   4 failure class   5 failure message
-- Returns how many were taken back.
local now = now_ms()
local lost = redis.call('ZRANGEBYSCORE', key('leases'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(lost) do
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'en', 'sa')
  release(id, job[4])
  if job[1] == RUNNING then
    local losses = redis.call('HINCRBY', job_key(id), 'lc', 1)
    local attempt = {
      epoch = tonumber(job[2]), worker = job[3], started = tonumber(job[5]), ended = now, ['end'] = ARGV[3],
    }
    local poison = losses >= tonumber(ARGV[2])
    if poison then
      attempt.class, attempt.message = ARGV[4], ARGV[5]
    end
    book(id, attempt)
    if poison then finish_job(id, FAILED, now) else queue_again(id, now) end
  end
end
if #lost > 0 then feed(look_ahead()) end
settle()
return #lost
