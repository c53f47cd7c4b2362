-- Keeps jobs that do not exist from being stored for a while: whoever reserved a request id for one and has not
-- enqueued it by now comes too late. May be repeated.
-- KEYS  1 lane
-- ARGV  ids
-- Returns for each job 1 when it does not exist, 0 when it does.
local answer = {}
for _, id in ipairs(ARGV) do
  local exists = redis.call('EXISTS', job_key(id))
  if exists == 0 then redis.call('SET', spec_key(id), '', 'PX', BURIED_MS) end
  answer[#answer + 1] = 1 - exists
end
return answer
