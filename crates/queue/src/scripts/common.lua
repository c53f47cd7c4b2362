-- Functions that several transitions share. Each script is this file, after the keys, before its own.
--
-- A call handles many jobs. What can be written once for all of them is collected here and written by `settle`, which
-- every script calls last: members of large sets, counters, and messages.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local hints = {}
local events = { t = {}, f = {} }
local opened = {}
local acknowledged = {}

local function hint(what)
  hints[what] = true
end

local function event(kind, id)
  local ids = events[kind]
  ids[#ids + 1] = id
end

-- Counts unfinished jobs, of the lane and of an experiment.
local function count_open(experiment, by)
  opened[''] = (opened[''] or 0) + by
  if experiment then opened[experiment] = (opened[experiment] or 0) + by end
end

-- Calls a command with `first` and then all of `list`, in parts that fit onto Lua's stack.
local function call_with(list, ...)
  local first = { ... }
  for at = 1, #list, 4000 do
    local part = {}
    for index = 1, #first do part[index] = first[index] end
    for index = at, math.min(at + 3999, #list) do part[#part + 1] = list[index] end
    redis.call(unpack(part))
  end
end

-- Writes what was collected.
local function settle()
  for experiment, by in pairs(opened) do
    if redis.call('HINCRBY', key('open'), experiment, by) <= 0 and experiment ~= '' then
      redis.call('HDEL', key('open'), experiment)
    end
  end
  if #acknowledged > 0 then
    call_with(acknowledged, 'XACK', key('stream'), GROUP)
    call_with(acknowledged, 'XDEL', key('stream'))
  end
  for kind, ids in pairs(events) do
    if #ids > 0 then redis.call('PUBLISH', key('events'), kind .. table.concat(ids)) end
  end
  for what in pairs(hints) do redis.call('PUBLISH', key('hints'), what) end
end

-- Moves waiting jobs into the stream until it holds `ahead` undelivered ones. The flow with the smallest virtual time
-- is next and pays with the job's estimated tokens over its weight (start-time fair queueing).
local function feed(ahead)
  local meta = redis.call('HMGET', key('meta'), 'un', 'vt')
  local undelivered = tonumber(meta[1]) or 0
  local wanted, fed, virtual = ahead - undelivered, 0, meta[2]
  while fed < wanted do
    local flows = redis.call('ZRANGE', key('flows'), 0, 1, 'WITHSCORES')
    if #flows == 0 then break end
    local flow, time = flows[1], tonumber(flows[2])
    local weight = tonumber(redis.call('HGET', key('weights'), flow)) or 1
    -- It stays next until it has passed the one behind it. Alone, it may take all places at once.
    local alone, limit = #flows == 2, tonumber(flows[4])
    local empty = false
    repeat
      local popped = redis.call('ZPOPMIN', backlog_key(flow), alone and wanted - fed or 1)
      for at = 1, #popped, 2 do
        local id = popped[at]
        redis.call('XADD', key('stream'), '*', 'j', id)
        virtual = time
        time = time + (tonumber(redis.call('HGET', job_key(id), 'tk')) or 1) / weight
        fed = fed + 1
      end
      empty = #popped == 0 or (alone and fed < wanted)
    until empty or fed >= wanted or time > limit
    if empty or redis.call('EXISTS', backlog_key(flow)) == 0 then
      redis.call('ZREM', key('flows'), flow)
    else
      redis.call('ZADD', key('flows'), time, flow)
    end
  end
  if fed > 0 then
    redis.call('HSET', key('meta'), 'un', undelivered + fed, 'vt', virtual)
    hint('w')
  end
  return fed
end

-- The look-ahead that live workers' capacities allow; kept by the heartbeat.
local function look_ahead()
  return tonumber(redis.call('HGET', key('meta'), 'la') or '0')
end

-- Puts jobs into the backlog of their flow; `entries` are pairs of order and id. A flow that had nothing waiting starts
-- at the lane's virtual time.
local function wait_in_backlog(flow, entries)
  redis.call('ZADD', key('flows'), 'NX', redis.call('HGET', key('meta'), 'vt') or '0', flow)
  call_with(entries, 'ZADD', backlog_key(flow))
end

-- Takes a job that has not started out of wherever it waits. An entry in the stream stays: claim skips it.
local function stop_waiting(id, flow)
  redis.call('ZREM', key('delayed'), id)
  redis.call('ZREM', backlog_key(flow), id)
  if redis.call('EXISTS', backlog_key(flow)) == 0 then redis.call('ZREM', key('flows'), flow) end
end

-- Books an attempt that has ended: a line of the job's ledger. An empty cost is unknown, an empty class no failure.
local function book(id, attempt)
  local line = {
    epoch = attempt.epoch, worker = attempt.worker, started_at = attempt.started, ended_at = attempt.ended,
    ['end'] = attempt['end'],
  }
  if attempt.cost and attempt.cost ~= '' then line.cost = attempt.cost end
  if attempt.class and attempt.class ~= '' then line.failure = { class = attempt.class, message = attempt.message } end
  redis.call('RPUSH', attempts_key(id), '\1' .. cmsgpack.pack(line))
end

-- Moves a job to a final state and tells everybody. The text of a running attempt goes; a result has it.
local function finish_job(id, state, now)
  local job = redis.call('HMGET', job_key(id), 'ex', 'dl', 'du', 'cx')
  redis.call('HSET', job_key(id), 'st', state, 'fa', now)
  if job[3] or job[4] then redis.call('HDEL', job_key(id), 'cx', 'du') end
  if job[2] then redis.call('ZREM', key('deadlines'), id) end
  redis.call('DEL', text_key(id))
  count_open(job[1] or nil, -1)
  if job[1] then
    redis.call('XADD', key('done'), '*', 'j', id, 'x', job[1])
  else
    redis.call('XADD', key('done'), '*', 'j', id)
  end
  event('f', id)
end

-- Ends a running job's hold on its stream entry and its lease.
local function release(id, entry)
  redis.call('ZREM', key('leases'), id)
  if entry then acknowledged[#acknowledged + 1] = entry end
end

-- Queues a job again in its old place, unless it was cancelled or its deadline passed meanwhile.
local function queue_again(id, now)
  local job = redis.call('HMGET', job_key(id), 'cx', 'dl', 'fl', 'cr')
  if job[1] then return finish_job(id, CANCELLED, now) end
  if job[2] and tonumber(job[2]) <= now then return finish_job(id, EXPIRED, now) end
  redis.call('HSET', job_key(id), 'st', QUEUED)
  redis.call('HDEL', job_key(id), 'du')
  wait_in_backlog(job[3], { job[4], id })
end
