-- Stores new jobs, puts them into their backlogs and feeds. A job that exists is left as it is, so this may be repeated.
-- KEYS  1 lane
-- ARGV  then for each job: id, spec, flow name, weight of its class, tenant, experiment or '', the model of a remote lane or
--       '', estimated tokens, deadline or '', not before or '', prefix group or '', order among groups and in it
-- Returns for each job 1 when it is new, 0 when it existed.
local now = now_ms()
local created = digits(now)
local answer, backlogs, deadlines, delayed = {}, {}, {}, {}
local numbers, starts = {}, {}

-- The number that keys and jobs carry instead of the name of a flow or a leaf.
local function number_of(name, describe)
  if numbers[name] then return numbers[name] end
  local number = redis.call('HGET', key('numbers'), name)
  if not number then
    number = tostring(redis.call('HINCRBY', key('numbers'), 'n', 1))
    redis.call('HSET', key('numbers'), name, number)
    if describe then describe(number) end
  end
  numbers[name] = number
  return number
end

-- Most jobs come with others like them.
local last = {}
local function leaf_number(flow, weight, tenant, experiment, split)
  if last.flow == flow and last.experiment == experiment and last.split == split then return last.number end
  last.flow, last.experiment, last.split = flow, experiment, split
  last.number = number_of(flow .. '/' .. experiment .. '/' .. split, function(number)
    redis.call('HSET', key('leaves'), number, number_of(flow) .. ':' .. weight .. ':' .. tenant .. ':' .. experiment)
    if split ~= '' then redis.call('HSET', key('models'), number, split) end
  end)
  return last.number
end

local experiments = {}
local function list_of(experiment)
  experiments[experiment] = experiments[experiment] or experiment_key(experiment)
  return experiments[experiment]
end

-- When the group of jobs with this prefix started, for a while the same.
local function group_start(leaf, prefix)
  local name = group_key(leaf, prefix)
  if not starts[name] then starts[name] = redis.call('SET', name, created, 'NX', 'GET', 'PX', GROUP_MS) or created end
  return starts[name]
end

local function list_in(lists, name)
  lists[name] = lists[name] or {}
  return lists[name]
end

-- The jobs that exist: those whose spec does, which is as old as its job. Asked of all at once, as most are new.
local function existing_jobs()
  local names, existing = {}, {}
  for at = 1, #ARGV, 12 do names[#names + 1] = spec_key(ARGV[at]) end
  for at = 1, #names, 4000 do
    local last = math.min(at + 3999, #names)
    if redis.call('EXISTS', unpack(names, at, last)) > 0 then
      for index = at, last do existing[names[index]] = redis.call('EXISTS', names[index]) == 1 end
    end
  end
  return existing
end

local existing = existing_jobs()
for at = 1, #ARGV, 12 do
  local id, spec, flow, weight, tenant, experiment, split, tokens, deadline, not_before, prefix, rank =
    unpack(ARGV, at, at + 11)
  local stored = spec_key(id)
  if existing[stored] then
    answer[#answer + 1] = 0
  else
    -- The same id may stand twice in one call.
    existing[stored] = true
    write(stored, spec)
    local leaf = leaf_number(flow, weight, tenant, experiment, split)
    local group = prefix ~= '' and rank .. group_start(leaf, prefix) or nil
    local waits = not_before ~= '' and tonumber(not_before) > now
    local job = job_key(id)
    redis.call('HSET', job, 'st', waits and DELAYED or QUEUED, 'lf', leaf, 'tk', tokens, 'cr', created)
    if group then redis.call('HSET', job, 'gp', group) end
    if deadline ~= '' then
      redis.call('HSET', job, 'dl', deadline)
      deadlines[#deadlines + 1] = deadline
      deadlines[#deadlines + 1] = id
    end
    if waits then
      redis.call('HSET', job, 'du', not_before)
      delayed[#delayed + 1] = not_before
      delayed[#delayed + 1] = id
    else
      local waiting = list_in(backlogs, leaf)
      local order, member = backlog_entry(id, tokens, created, group)
      waiting[#waiting + 1] = order
      waiting[#waiting + 1] = member
    end
    local place = redis.call('XADD', key('jobs'), '*', 'j', id)
    if experiment ~= '' then redis.call('XADD', list_of(experiment), place, 'j', id) end
    count_open(experiment, 1)
    answer[#answer + 1] = 1
  end
end
call_with(deadlines, 'ZADD', key('deadlines'))
call_with(delayed, 'ZADD', key('delayed'))
for leaf, list in pairs(backlogs) do wait_in_backlog(leaf, list) end
-- Workers that are full hear nothing new: they claim again when a job of theirs ends.
if next(backlogs) and feed(now) == 0 then hint('w') end
settle()
return answer
