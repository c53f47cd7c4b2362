-- Ends attempts: the state moves, the result is kept, the attempt is booked, the lease goes. An attempt whose lease
-- was lost changes nothing, but what it cost is booked. May be repeated.
-- KEYS  1 lane
-- ARGV  1 how a fenced attempt ends   then for each attempt: id, epoch, worker, its start, new state, how it ended,
--       cost or '', failure class or '', failure message, result or '', delay ms
-- Returns for each attempt 1 when kept, 0 when the lease was lost.
local now = now_ms()

local function finish(id, epoch, worker, started, state, ended, cost, class, message, result, delay_ms)
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'en', 'cx', 'k' .. epoch, 'dl')
  if not job[1] then return 0 end
  local attempt = {
    epoch = tonumber(epoch), worker = worker, started = tonumber(started), ended = now, ['end'] = ended,
    cost = cost, class = class, message = message,
  }
  if job[1] ~= RUNNING or job[2] ~= epoch or job[3] ~= worker then
    -- Either this very call was made before, or the lease went to somebody else.
    if job[6] then return 1 end
    if redis.call('HSETNX', job_key(id), 'f' .. epoch, 1) == 1 then
      attempt['end'] = ARGV[1]
      book(id, attempt)
    end
    return 0
  end
  release(id, job[4])
  book(id, attempt)
  redis.call('HSET', job_key(id), 'k' .. epoch, 1)
  if class ~= '' then redis.call('HINCRBY', job_key(id), 'fc', 1) end
  if state == QUEUED then
    queue_again(id, now)
  elseif state ~= DELAYED then
    if result ~= '' then redis.call('SET', result_key(id), result) end
    finish_job(id, state, now)
  elseif job[5] then
    finish_job(id, CANCELLED, now)
  elseif job[7] and tonumber(job[7]) <= now then
    finish_job(id, EXPIRED, now)
  else
    local due = now + tonumber(delay_ms)
    redis.call('HSET', job_key(id), 'st', DELAYED, 'du', due)
    redis.call('ZADD', key('delayed'), due, id)
  end
  return 1
end

local answer = {}
for at = 2, #ARGV, 11 do answer[#answer + 1] = finish(unpack(ARGV, at, at + 10)) end
feed(look_ahead())
settle()
return answer
