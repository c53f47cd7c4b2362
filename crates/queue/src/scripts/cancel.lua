-- Cancels unfinished jobs: those that wait or are in a batch at once, running ones by telling their workers. May be repeated.
-- KEYS  1 lane
-- ARGV  ids
-- Returns for each job: c(ancelled), r(unning, its worker will be told), f(inal already), n(o such job).
local now = now_ms()
local answer, running = {}, false
for _, id in ipairs(ARGV) do
  local job = read_job(id)
  if not job.state then
    answer[#answer + 1] = 'n'
  elseif FINAL[job.state] then
    answer[#answer + 1] = 'f'
  elseif job.batch then
    leave_batch(id, job.batch)
    finish_job(id, job, CANCELLED, now)
    answer[#answer + 1] = 'c'
  elseif job.state == RUNNING then
    redis.call('HSET', job_key(id), 'cx', 1)
    running = true
    answer[#answer + 1] = 'r'
  else
    stop_waiting(id, job, now)
    finish_job(id, job, CANCELLED, now)
    answer[#answer + 1] = 'c'
  end
end
if running then hint('c') end
settle()
return answer
