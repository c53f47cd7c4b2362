-- Ends attempts: the state moves, the result is kept, the attempt is booked, the lease goes. An attempt whose lease
-- was lost changes nothing, but what it cost is booked. May be repeated.
-- KEYS  1 lane
-- ARGV  1 how a fenced attempt ends   then for each attempt: id, epoch, worker, its start, new state, how it ended,
--       cost or '', failure class or '', failure message, result or '', delay ms, 1 when the failure counts, what its
--       call tells or '' when it made none
-- Returns for each attempt 1 when kept, 0 when the lease was lost.
local now = now_ms()

local function finish(id, epoch, worker, started, state, ended, cost, class, message, result, delay_ms, counts, told)
  local stored = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'en', 'cx', 'k' .. epoch, 'dl', 'lf', 'tk', 'pm', 'bt')
  if not stored[1] then return 0 end
  local attempt = {
    epoch = tonumber(epoch), worker = worker, started_at = tonumber(started), ended_at = now, ['end'] = ended,
  }
  if stored[1] ~= RUNNING or stored[2] ~= epoch or stored[3] ~= worker then
    -- Either this very call was made before, or the lease went to somebody else.
    if stored[6] then return 1 end
    if redis.call('HSETNX', job_key(id), 'f' .. epoch, 1) == 1 then
      attempt['end'] = ARGV[1]
      book(id, attempt, cost, class, message)
    end
    return 0
  end
  local job = { cancelled = stored[5], deadline = stored[7], leaf = stored[8], tokens = stored[9], permit = stored[10] }
  if job.permit then told = told ~= '' and cmsgpack.unpack(told) or nil end
  if stored[11] then leave_batch(id, stored[11]) else release(id, job, stored[4]) end
  release_permit(id, job, now, attempt.started_at, told)
  book(id, attempt, cost, class, message, epoch == '1')
  local kept = 'k' .. epoch
  if counts == '1' then redis.call('HINCRBY', job_key(id), 'fc', 1) end
  if state == QUEUED then
    queue_again(id, read_job(id), now, kept, '1')
  elseif state ~= DELAYED then
    if result ~= '' then write(result_key(id), result) end
    finish_job(id, job, state, now, kept, '1')
  elseif job.cancelled then
    finish_job(id, job, CANCELLED, now, kept, '1')
  elseif job.deadline and tonumber(job.deadline) <= now then
    finish_job(id, job, EXPIRED, now, kept, '1')
  else
    local due = now + tonumber(delay_ms)
    redis.call('HSET', job_key(id), 'st', DELAYED, 'du', digits(due), kept, '1')
    redis.call('ZADD', key('delayed'), due, id)
  end
  return 1
end

-- What was collected for the others is written even where one attempt cannot be ended: Redis takes nothing back.
local answer, problem = {}, nil
for at = 2, #ARGV, 13 do
  local ended, kept = pcall(finish, unpack(ARGV, at, at + 12))
  if ended then answer[#answer + 1] = kept else problem = kept end
end
feed(now)
settle()
if problem then error(problem) end
return answer
