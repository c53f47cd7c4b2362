-- Stores new jobs, puts them into their backlogs and feeds. A job that exists is left as it is, so this may be repeated.
-- KEYS  1 lane
-- ARGV  then for each job: id, spec, flow name, weight, estimated tokens, deadline or '', experiment or ''
-- Returns for each job 1 when it is new, 0 when it existed.
local now = now_ms()
local answer, jobs, flows, backlogs, experiments, deadlines = {}, {}, {}, {}, {}, {}

-- The number of a flow, which keys and jobs carry instead of its name.
local function flow_number(name, weight)
  if flows[name] then return flows[name] end
  local flow = redis.call('HGET', key('flow'), name)
  if not flow then
    flow = redis.call('HINCRBY', key('flow'), 'n', 1)
    redis.call('HSET', key('flow'), name, flow)
    redis.call('HSET', key('weights'), flow, weight)
  end
  flows[name] = flow
  return flow
end

local function add(lists, name, score, id)
  local list = lists[name] or {}
  lists[name] = list
  list[#list + 1] = score
  list[#list + 1] = id
end

for at = 1, #ARGV, 7 do
  local id, deadline, experiment = ARGV[at], ARGV[at + 5], ARGV[at + 6]
  -- A spec is as old as its job, and the same id may stand twice in one call.
  if not redis.call('SET', spec_key(id), ARGV[at + 1], 'NX') then
    answer[#answer + 1] = 0
  else
    local flow = flow_number(ARGV[at + 2], ARGV[at + 3])
    local fields = { 'HSET', job_key(id), 'st', QUEUED, 'fl', flow, 'tk', ARGV[at + 4], 'cr', now }
    jobs[#jobs + 1] = 0
    jobs[#jobs + 1] = id
    add(backlogs, flow, now, id)
    if deadline ~= '' then
      fields[#fields + 1] = 'dl'
      fields[#fields + 1] = deadline
      add(deadlines, 'all', deadline, id)
    end
    if experiment ~= '' then
      fields[#fields + 1] = 'ex'
      fields[#fields + 1] = experiment
      add(experiments, experiment, 0, id)
    end
    redis.call(unpack(fields))
    count_open(experiment ~= '' and experiment or nil, 1)
    answer[#answer + 1] = 1
  end
end
call_with(jobs, 'ZADD', key('jobs'))
call_with(deadlines.all or {}, 'ZADD', key('deadlines'))
for experiment, list in pairs(experiments) do call_with(list, 'ZADD', experiment_key(experiment)) end
for flow, list in pairs(backlogs) do wait_in_backlog(flow, list) end
-- Workers that are full hear nothing new: they claim again when a job of theirs ends.
if feed(look_ahead()) == 0 and #jobs > 0 then hint('w') end
settle()
return answer
