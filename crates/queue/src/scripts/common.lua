-- Functions that several transitions share. Each script is this file, after the keys, before its own.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function hint(what)
  redis.call('PUBLISH', key('hints'), what)
end

local function event(kind, id)
  redis.call('PUBLISH', key('events'), kind .. id)
end

-- Moves waiting jobs into the stream until it holds `ahead` undelivered ones. The flow with the smallest virtual time
-- is next and pays with the job's estimated tokens over its weight (start-time fair queueing).
local function feed(ahead)
  local meta = redis.call('HMGET', key('meta'), 'un', 'vt')
  local undelivered = tonumber(meta[1]) or 0
  local wanted, fed = ahead - undelivered, 0
  local virtual = meta[2]
  while fed < wanted do
    local flow = redis.call('ZRANGE', key('flows'), 0, 0, 'WITHSCORES')
    if #flow == 0 then break end
    local backlog = backlog_key(flow[1])
    local first = redis.call('ZPOPMIN', backlog)
    if #first == 0 then
      redis.call('ZREM', key('flows'), flow[1])
    else
      local id = first[1]
      local entry = redis.call('XADD', key('stream'), '*', 'j', id)
      redis.call('HSET', job_key(id), 'en', entry)
      virtual = flow[2]
      local pay = redis.call('HMGET', job_key(id), 'tk', 'wt')
      redis.call('ZADD', key('flows'), tonumber(virtual) + (tonumber(pay[1]) or 1) / (tonumber(pay[2]) or 1), flow[1])
      if redis.call('EXISTS', backlog) == 0 then redis.call('ZREM', key('flows'), flow[1]) end
      fed = fed + 1
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

-- Puts a job into the backlog of its flow. A flow that had nothing waiting starts at the lane's virtual time.
local function wait_in_backlog(id, flow, order)
  if redis.call('ZSCORE', key('flows'), flow) == false then
    redis.call('ZADD', key('flows'), redis.call('HGET', key('meta'), 'vt') or '0', flow)
  end
  redis.call('ZADD', backlog_key(flow), order, id)
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
  redis.call('HSET', job_key(id), 'st', state, 'fa', now)
  redis.call('HDEL', job_key(id), 'en', 'cx', 'du')
  local job = redis.call('HMGET', job_key(id), 'ex', 'dl')
  if job[2] then redis.call('ZREM', key('deadlines'), id) end
  redis.call('DEL', text_key(id))
  redis.call('HINCRBY', key('open'), '', -1)
  if job[1] then
    if redis.call('HINCRBY', key('open'), job[1], -1) <= 0 then redis.call('HDEL', key('open'), job[1]) end
    redis.call('XADD', key('done'), '*', 'j', id, 'x', job[1])
  else
    redis.call('XADD', key('done'), '*', 'j', id)
  end
  event('f', id)
end

-- Ends a running job's hold on its stream entry and its lease.
local function release(id, entry)
  redis.call('ZREM', key('leases'), id)
  if entry then
    redis.call('XACK', key('stream'), GROUP, entry)
    redis.call('XDEL', key('stream'), entry)
  end
end

-- Queues a job again in its old place, unless it was cancelled or its deadline passed meanwhile.
local function queue_again(id, now)
  local job = redis.call('HMGET', job_key(id), 'cx', 'dl', 'fl', 'cr')
  if job[1] then return finish_job(id, CANCELLED, now) end
  if job[2] and tonumber(job[2]) <= now then return finish_job(id, EXPIRED, now) end
  redis.call('HSET', job_key(id), 'st', QUEUED)
  redis.call('HDEL', job_key(id), 'en', 'du')
  wait_in_backlog(id, job[3], job[4])
end
