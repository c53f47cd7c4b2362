-- Removes finished jobs and everything that is stored of them. May be repeated.
-- KEYS  1 lane
-- ARGV  then for each job: id, place in the list of jobs, the failed job that it repeats or ''
-- Returns for each job 1 when it is gone now, 0 when it is unfinished.
local answer = {}
for at = 1, #ARGV, 3 do
  local id, place, repeated = unpack(ARGV, at, at + 2)
  local job = redis.call('HMGET', job_key(id), 'st', 'lf', 'de')
  if job[1] and not FINAL[job[1]] then
    answer[#answer + 1] = 0
  else
    if job[1] then
      local experiment = leaf_of(job[2]).experiment
      if experiment ~= '' then redis.call('XDEL', experiment_key(experiment), place) end
      -- Redriving that one again must not bring this one back.
      if repeated ~= '' and redis.call('EXISTS', job_key(repeated)) == 1 then
        redis.call('HSET', job_key(repeated), 'rg', 1)
      end
      if job[3] then redis.call('XDEL', key('dead'), job[3]) end
    end
    redis.call('XDEL', key('jobs'), place)
    redis.call('DEL', job_key(id), spec_key(id), text_key(id), result_key(id), attempts_key(id))
    answer[#answer + 1] = 1
  end
end
return answer
