-- Removes finished jobs: their fields, records and places in the lists. Their entries in the stream of finished jobs
-- stay, since where those stand is not known, and so does what the lane knows of flows and leaves. A job that was
-- removed cannot be enqueued for a while: somebody may be about to, who met its request id before. May be repeated.
-- KEYS  1 lane
-- ARGV  then for each job: id, place in the list of jobs, the failed job that it repeats or ''
-- Returns for each job 1 when this call removed it, 0 when it is unfinished or was gone before.
local answer = {}
for at = 1, #ARGV, 3 do
  local id, place, repeated = unpack(ARGV, at, at + 2)
  local job = redis.call('HMGET', job_key(id), 'st', 'lf', 'de')
  if not job[1] or not FINAL[job[1]] then
    answer[#answer + 1] = 0
  else
    local experiment = leaf_of(job[2]).experiment
    if experiment ~= '' then
      local list = experiment_key(experiment)
      redis.call('XDEL', list, place)
      -- A stream without entries would stay.
      if redis.call('XLEN', list) == 0 then redis.call('DEL', list) end
    end
    -- Redriving that one again must not bring this one back.
    if repeated ~= '' and redis.call('EXISTS', job_key(repeated)) == 1 then
      redis.call('HSET', job_key(repeated), 'rg', 1)
    end
    if job[3] then redis.call('XDEL', key('dead'), job[3]) end
    redis.call('XDEL', key('jobs'), place)
    redis.call('DEL', job_key(id), text_key(id), result_key(id), attempts_key(id))
    redis.call('SET', spec_key(id), '', 'PX', BURIED_MS)
    answer[#answer + 1] = 1
  end
end
return answer
