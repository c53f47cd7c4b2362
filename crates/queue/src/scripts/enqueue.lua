-- Stores new jobs, puts them into their backlogs and feeds. A job that exists is left as it is, so this may be repeated.
-- KEYS  1 lane
-- ARGV  then for each job: id, spec, flow name, weight, estimated tokens, deadline or '', experiment or ''
-- Returns for each job 1 when it is new, 0 when it existed.
local now = now_ms()
local answer = {}
for at = 1, #ARGV, 7 do
  local id, flow_name, deadline, experiment = ARGV[at], ARGV[at + 2], ARGV[at + 5], ARGV[at + 6]
  if redis.call('EXISTS', job_key(id)) == 1 then
    answer[#answer + 1] = 0
  else
    local flow = redis.call('HGET', key('flow'), flow_name)
    if not flow then
      flow = redis.call('HINCRBY', key('flow'), 'n', 1)
      redis.call('HSET', key('flow'), flow_name, flow)
    end
    redis.call('SET', spec_key(id), ARGV[at + 1])
    redis.call('HSET', job_key(id), 'st', QUEUED, 'fl', flow, 'wt', ARGV[at + 3], 'tk', ARGV[at + 4], 'cr', now)
    redis.call('ZADD', key('jobs'), 0, id)
    redis.call('HINCRBY', key('open'), '', 1)
    if deadline ~= '' then
      redis.call('HSET', job_key(id), 'dl', deadline)
      redis.call('ZADD', key('deadlines'), deadline, id)
    end
    if experiment ~= '' then
      redis.call('HSET', job_key(id), 'ex', experiment)
      redis.call('ZADD', experiment_key(experiment), 0, id)
      redis.call('HINCRBY', key('open'), experiment, 1)
    end
    wait_in_backlog(id, flow, now)
    answer[#answer + 1] = 1
  end
end
-- Workers that are full hear nothing: they claim again when a job of theirs ends.
if feed(look_ahead()) == 0 then hint('w') end
return answer
