-- Ends an attempt: the state moves, the result is kept, the attempt is booked, the lease goes. An attempt whose lease
-- was lost changes nothing, but what it cost is booked. May be repeated.
-- KEYS  1 lane
-- ARGV  1 id   2 epoch   3 worker   4 new state   5 how the attempt ended   6 cost or ''   7 failure class or ''
--       8 failure message   9 result or ''   10 delay ms   11 how a fenced attempt ends   12 its start
-- Returns 1 when kept, 0 when the lease was lost.
local id, epoch, worker, state = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now = now_ms()
local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'le', 'en')
local attempt = {
  epoch = tonumber(epoch), worker = worker, started = tonumber(ARGV[12]), ended = now,
  ['end'] = ARGV[5], cost = ARGV[6], class = ARGV[7], message = ARGV[8],
}
if not job[1] then return 0 end
if job[1] ~= RUNNING or job[2] ~= epoch or job[3] ~= worker then
  -- Either this very call was made before, or the lease went to somebody else.
  if job[4] == epoch and redis.call('HGET', job_key(id), 'lw') == worker then return 1 end
  if redis.call('HSETNX', job_key(id), 'f' .. epoch, 1) == 1 then
    attempt['end'] = ARGV[11]
    book(id, attempt)
  end
  return 0
end
release(id, job[5])
book(id, attempt)
redis.call('HSET', job_key(id), 'le', epoch, 'lw', worker)
if ARGV[7] ~= '' then redis.call('HINCRBY', job_key(id), 'fc', 1) end
if state == QUEUED then
  queue_again(id, now)
elseif state == DELAYED then
  local asked = redis.call('HGET', job_key(id), 'cx')
  if asked then
    finish_job(id, CANCELLED, now)
  else
    local due = now + tonumber(ARGV[10])
    redis.call('HSET', job_key(id), 'st', DELAYED, 'du', due)
    redis.call('HDEL', job_key(id), 'en')
    redis.call('ZADD', key('delayed'), due, id)
  end
else
  if ARGV[9] ~= '' then redis.call('SET', result_key(id), ARGV[9]) end
  finish_job(id, state, now)
end
feed(look_ahead())
return 1
