-- Functions that several transitions share. Each script is this file, after the keys, before its own.
--
-- A call handles many jobs. What can be written once for all of them is collected here and written by `settle`, which
-- every script calls last that moves jobs: members of large sets, counters, and messages.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- A whole number as an argument of a command. Redis writes a number of Lua with all digits of its fraction, which costs
-- more than many a command.
local function digits(number)
  return string.format('%d', number)
end

local hints = {}
local events = { t = {}, f = {} }
local opened = {}
local acknowledged = {}
local released = {}
local texts = {}
local written = {}
local places = {}

local function hint(what)
  hints[what] = true
end

local function event(kind, id)
  local ids = events[kind]
  ids[#ids + 1] = id
end

-- Sets a key at the end of the call.
local function write(name, value)
  written[#written + 1] = name
  written[#written + 1] = value
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

-- What a leaf is part of: its flow, the weight of the flow's class, its tenant, its experiment or ''.
local leaves = {}
local function leaf_of(number)
  local leaf = leaves[number]
  if leaf then return leaf end
  leaf = { number = number }
  local stored = redis.call('HGET', key('leaves'), number) or ''
  leaf.flow, leaf.weight, leaf.tenant, leaf.experiment = string.match(stored, '^(%d+):(%d+):([^:]*):(.*)$')
  leaf.weight = tonumber(leaf.weight)
  leaves[number] = leaf
  return leaf
end

-- Counts unfinished jobs, of the lane and of an experiment.
local function count_open(experiment, by)
  opened[''] = (opened[''] or 0) + by
  if experiment ~= '' then opened[experiment] = (opened[experiment] or 0) + by end
end

-- The setting of a kind for a name, or nil. Each is read once for a call, and only where there are any.
local settings, any_set = {}, nil
local function setting(kind, name)
  if any_set == nil then any_set = redis.call('EXISTS', key('settings')) == 1 end
  if not any_set then return nil end
  local full = kind .. name
  if settings[full] == nil then
    settings[full] = string.match(redis.call('HGET', key('settings'), full) or '', ':(.+)$') or false
  end
  return settings[full] or nil
end

local function lane_is_paused()
  return setting('pause/lane', '') ~= nil
end

-- How many jobs are in the stream or run: of a tenant, or of the lane with ''. The first never exceeds a cap, so
-- neither do the running ones.
local in_flight_read = {}
local function in_flight(tenant)
  local stored = in_flight_read[tenant]
  if not stored then
    stored = tonumber(redis.call('HGET', key('places'), tenant)) or 0
    in_flight_read[tenant] = stored
  end
  return stored + (places[tenant] or 0)
end

local function take_places(tenant, count)
  places[tenant] = (places[tenant] or 0) + count
  places[''] = (places[''] or 0) + count
end

-- How many more jobs may be in flight.
local function room(tenant)
  local cap = tenant == '' and setting('cap/lane', '') or tenant ~= '' and setting('cap/tenant/', tenant)
  return cap and tonumber(cap) - in_flight(tenant) or math.huge
end

-- Lets a flow or a leaf stand in `set` again, not before the virtual time that it has used up.
local function stand(set, number, virtual)
  local used = tonumber(redis.call('HGET', key('used'), number)) or 0
  redis.call('ZADD', set, 'NX', math.max(used, tonumber(virtual) or 0), number)
end

-- Takes a flow or a leaf out of `set` and remembers what it has used up, so that going away gains nothing.
local function stand_down(set, number, time)
  redis.call('ZREM', set, number)
  redis.call('HSET', key('used'), number, time)
end

-- Lets a flow be fed again when it has anything that waits.
local function stand_flow(flow)
  if redis.call('EXISTS', flow_key(flow)) == 1 then stand(key('flows'), flow, redis.call('HGET', key('meta'), 'vt')) end
end

local function stand_leaf(number)
  local flow = leaf_of(number).flow
  stand(flow_key(flow), number, redis.call('HGET', key('used'), 'in/' .. flow))
  stand_flow(flow)
end

-- Gives places back. Flows that waited for one are fed again.
local function give_places(tenant, count)
  take_places(tenant, -count)
  if setting('cap/tenant/', tenant) then
    for _, flow in ipairs(redis.call('SMEMBERS', full_key(tenant))) do stand_flow(flow) end
    redis.call('DEL', full_key(tenant))
  end
end

-- Puts jobs into the backlog of their leaf; `entries` are pairs of order and member.
local function wait_in_backlog(leaf, entries)
  call_with(entries, 'ZADD', backlog_key(leaf))
  stand_leaf(leaf)
end

-- Order and member of a job in its backlog: by acceptance; with `group`, by the start of its prefix group and in that
-- by the five bytes before its id, which keep groups apart that started together and put the longest output first.
-- Behind the id stand its tokens, so that feeding need not read the job.
local function backlog_entry(id, tokens, created, group)
  local member = id .. struct.pack('>I3', math.min(tonumber(tokens) or 1, 16777215))
  if group then return string.sub(group, 6), string.sub(group, 1, 5) .. member end
  return created, member
end

-- The job and the tokens of a member of a backlog.
local function job_of(member)
  return string.sub(member, -19, -4), struct.unpack('>I3', string.sub(member, -3))
end

-- What lets jobs of remote models through. Most lanes have no gates, and need none of its functions.
local opened_permits = nil
local function permits()
  opened_permits = opened_permits or open_permits(stand_leaf, job_of, digits)
  return opened_permits
end

-- Ends the permit of a job, if it has one, see permits.release.
local function release_permit(id, job, now, started, told)
  if job.permit then permits().release(id, leaf_of(job.leaf), job.permit, job.tokens, now, started, told) end
end

-- Why a flow's or a leaf's jobs may not be fed: the set in which it waits until they may.
local function held(leaf)
  if setting('pause/tenant/', leaf.tenant) then return key('paused'), key('flows'), leaf.flow end
  if leaf.experiment ~= '' and setting('pause/experiment/', leaf.experiment) then
    return key('paused'), flow_key(leaf.flow), leaf.number
  end
  if room(leaf.tenant) <= 0 then return full_key(leaf.tenant), key('flows'), leaf.flow end
end

-- Whether a job that was fed must not start all the same: its tenant or experiment was paused, or a cap lowered.
local function must_wait(leaf)
  if any_set == false then return false end
  return setting('pause/tenant/', leaf.tenant)
    or (leaf.experiment ~= '' and setting('pause/experiment/', leaf.experiment))
    or room(leaf.tenant) < 0
    or room('') < 0
end

-- The tokens that a job of an age is charged as: the longer one waited, the less, as if it were of a higher
-- class.
local function charge(leaf, tokens, age_ms)
  local weight = math.min(WEIGHT_MAX, leaf.weight * 2 ^ (math.max(0, age_ms) / AGING_MS))
  return tokens / (weight * (tonumber(setting('weight/tenant/', leaf.tenant)) or 100) / 100)
end

-- Moves waiting jobs into the stream: as many as live workers have places free, and for a claim what it has `asked`
-- for. So nothing is ahead of what comes next while all are busy. Where tokens bound what a worker can run, free places
-- tell nothing, and only claims feed. The flow with the smallest virtual time is next, in it the leaf with the smallest,
-- and both pay with the job's estimated tokens over their weight (start-time fair queueing). Where gates are, each job
-- needs a permit; for a claim, one with a key that is `mine`.
local function feed(now, asked, mine)
  local meta = redis.call('HMGET', key('meta'), 'un', 'vt', 'ca', 'tb', 'gt')
  local undelivered, virtual, capacity = tonumber(meta[1]) or 0, tonumber(meta[2]) or 0, tonumber(meta[3]) or 0
  local free = meta[4] == '1' and 0 or capacity - in_flight('')
  local wanted, fed = math.max(free, (asked or 0) - undelivered), 0
  if wanted <= 0 or lane_is_paused() then return 0 end
  wanted = math.min(wanted, room(''))
  local gated = meta[5] and meta[5] ~= '' and permits()
  if gated then gated.wake(now) end
  while fed < wanted do
    local flows = redis.call('ZRANGE', key('flows'), 0, 1, 'WITHSCORES')
    local flow, time = flows[1], tonumber(flows[2])
    if not flow then break end
    local found = redis.call('ZRANGE', flow_key(flow), 0, 1, 'WITHSCORES')
    local number, leaf_time = found[1], tonumber(found[2])
    local leaf = number and leaf_of(number)
    local waits, from, who = nil, nil, nil
    if leaf then waits, from, who = held(leaf) end
    if not leaf then
      stand_down(key('flows'), flow, time)
    elseif waits then
      redis.call('SADD', waits, who)
      stand_down(from, who, who == flow and time or leaf_time)
    else
      -- They stay next until they have passed those behind them. Alone, they may take all places at once.
      local limit, leaf_limit = tonumber(flows[4]) or math.huge, tonumber(found[4]) or math.huge
      local alone = #flows == 2 and #found == 2
      local most, taken, empty, leaf_virtual = math.min(wanted - fed, room(leaf.tenant)), 0, false, leaf_time
      repeat
        local count = alone and not gated and most or 1
        local popped = gated and gated.pop(leaf, now, mine) or redis.call('ZPOPMIN', backlog_key(number), count)
        if #popped > 0 then virtual, leaf_virtual = time, leaf_time end
        for at = 1, #popped, 2 do
          local id, size = job_of(popped[at])
          redis.call('XADD', key('stream'), '*', 'j', id)
          time = time + charge(leaf, size, now - tonumber(popped[at + 1]))
          leaf_time = leaf_time + size
        end
        taken = taken + #popped / 2
        empty = #popped / 2 < count
      until empty or taken >= most or time > limit or leaf_time > leaf_limit
      fed = fed + taken
      if taken > 0 then redis.call('HSET', key('used'), 'in/' .. flow, leaf_virtual) end
      take_places(leaf.tenant, taken)
      if empty or redis.call('EXISTS', backlog_key(number)) == 0 then
        stand_down(flow_key(flow), number, leaf_time)
      else
        redis.call('ZADD', flow_key(flow), leaf_time, number)
      end
      if redis.call('EXISTS', flow_key(flow)) == 0 then
        stand_down(key('flows'), flow, time)
      else
        redis.call('ZADD', key('flows'), time, flow)
      end
    end
  end
  if fed > 0 then
    redis.call('HSET', key('meta'), 'un', undelivered + fed, 'vt', virtual)
    hint('w')
  end
  return fed
end

-- What workers have declared together: every key, of limits that differ the strictest, every model that others cover.
local function declared_by_all(declared)
  local first = next(declared)
  if not first or not next(declared, first) then return first or '' end
  local covered, seen = { throttled = {}, failing = {} }, {}
  local all, keys, limits, sorted = { keys = {}, start = math.huge, limits = {}, covered = covered }, {}, {}, {}
  for packed in pairs(declared) do sorted[#sorted + 1] = packed end
  -- The same workers tell the same, whoever asks.
  table.sort(sorted)
  for _, packed in ipairs(sorted) do
    local one = cmsgpack.unpack(packed)
    all.start = math.min(all.start, one.start)
    for _, name in ipairs(one.keys) do
      if not keys[name] then all.keys[#all.keys + 1] = name end
      keys[name] = true
    end
    for why, models in pairs(one.covered or {}) do
      for _, model in ipairs(models) do
        if not seen[why .. model] then covered[why][#covered[why] + 1] = model end
        seen[why .. model] = true
      end
    end
    for _, limit in ipairs(one.limits) do
      local known = limits[limit.model]
      if not known then
        all.limits[#all.limits + 1] = limit
        limits[limit.model] = limit
      else
        for _, what in ipairs({ 'requests', 'tokens', 'concurrency' }) do
          known[what] = known[what] and limit[what] and math.min(known[what], limit[what]) or known[what] or limit[what]
        end
      end
    end
  end
  return cmsgpack.pack(all)
end

-- Adds up what live workers can run, which bounds what is fed, and which keys they have. Returns what others than
-- `worker` have free: a list of places and of the tokens that these can hold together.
local function count_slots(now, worker)
  local slots = redis.call('HGETALL', key('slots'))
  local total, bounded, free, declared = 0, '0', {}, {}
  for at = 1, #slots, 2 do
    local size, ends, places, tokens, gates = string.match(slots[at + 1], '(%d+):(%d+):(%d+):(%d*):?(.*)$')
    if tonumber(ends) > now then
      if gates ~= '' then declared[gates] = true end
      total = total + tonumber(size)
      if tokens ~= '' then bounded = '1' end
      if slots[at] ~= worker and tonumber(places) > 0 then
        free[#free + 1] = { places = tonumber(places), tokens = tonumber(tokens) or math.huge }
      end
    elseif #redis.call('XPENDING', key('stream'), GROUP, '-', '+', 1, slots[at]) == 0 then
      -- A worker that died: its consumer goes once its leases have been taken back.
      redis.call('XGROUP', 'DELCONSUMER', key('stream'), GROUP, slots[at])
      redis.call('HDEL', key('slots'), slots[at])
    end
  end
  local gates, before = declared_by_all(declared), redis.call('HGET', key('meta'), 'gt')
  redis.call('HSET', key('meta'), 'ca', total, 'tb', bounded, 'gt', gates)
  -- With other keys or limits, what was held back may go.
  if before and before ~= gates then
    permits().open(now)
    hint('w')
  end
  return free
end

-- Takes a job that has not started out of wherever it waits. An entry in the stream stays: claim skips it.
local function stop_waiting(id, job, now)
  if job.state == DELAYED then
    redis.call('ZREM', key('delayed'), id)
  else
    local _, member = backlog_entry(id, job.tokens, job.created, job.group)
    if redis.call('ZREM', backlog_key(job.leaf), member) == 0 then give_places(leaf_of(job.leaf).tenant, 1) end
    release_permit(id, job, now)
  end
end

-- Books an attempt that has ended: a line of the job's ledger. An empty cost is unknown, an empty class no failure.
-- The first of a job can be written with those of others.
local function book(id, line, cost, class, message, first)
  if cost and cost ~= '' then line.cost = cost end
  if class and class ~= '' then line.failure = { class = class, message = message } end
  local packed = '\1' .. cmsgpack.pack(line)
  if first then write(attempts_key(id), packed) else redis.call('APPEND', attempts_key(id), packed) end
end

-- What moving a job on needs to know of it.
local function read_job(id)
  local job = redis.call('HMGET', job_key(id), 'st', 'lf', 'gp', 'cr', 'tk', 'dl', 'cx', 'du', 'pm', 'bt')
  return {
    state = job[1], leaf = job[2], group = job[3], created = job[4], tokens = job[5], deadline = job[6],
    cancelled = job[7], due = job[8], permit = job[9], batch = job[10],
  }
end

-- Moves a job to a final state and tells everybody. The text of a running attempt goes; a result has it. `...` are
-- further fields to be set.
local function finish_job(id, job, state, now, ...)
  redis.call('HSET', job_key(id), 'st', state, 'fa', digits(now), ...)
  if job.cancelled or job.due then redis.call('HDEL', job_key(id), 'cx', 'du') end
  if job.deadline then redis.call('ZREM', key('deadlines'), id) end
  texts[#texts + 1] = text_key(id)
  local experiment = leaf_of(job.leaf).experiment
  count_open(experiment, -1)
  if experiment == '' then
    redis.call('XADD', key('done'), '*', 'j', id)
  else
    redis.call('XADD', key('done'), '*', 'j', id, 'x', experiment)
  end
  if state == FAILED then redis.call('HSET', job_key(id), 'de', redis.call('XADD', key('dead'), '*', 'j', id)) end
  event('f', id)
end

-- Ends a running job's hold on its stream entry, its lease and its place.
local function release(id, job, entry)
  released[#released + 1] = id
  if entry then acknowledged[#acknowledged + 1] = entry end
  give_places(leaf_of(job.leaf).tenant, 1)
end

-- Takes a job out of its batch. What comes of it there is no concern of the job any more, but is booked.
local function leave_batch(id, tag)
  redis.call('HDEL', job_key(id), 'bt')
  redis.call('HINCRBY', batch_key(tag), 'lv', -1)
  redis.call('HINCRBY', key('meta'), 'bt', -1)
end

-- Queues a job again in its old place, unless it was cancelled or its deadline passed meanwhile.
local function queue_again(id, job, now, ...)
  if job.cancelled then return finish_job(id, job, CANCELLED, now, ...) end
  if job.deadline and tonumber(job.deadline) <= now then return finish_job(id, job, EXPIRED, now, ...) end
  redis.call('HSET', job_key(id), 'st', QUEUED, ...)
  if job.due then redis.call('HDEL', job_key(id), 'du') end
  wait_in_backlog(job.leaf, { backlog_entry(id, job.tokens, job.created, job.group) })
end

-- Lets acknowledged entries of the stream go. To delete one, Redis reads its block up to it, so those before the oldest
-- that is pending go together; only where long runs hold up too many is each deleted by itself.
local function drop_entries(acknowledged)
  local oldest = redis.call('XPENDING', key('stream'), GROUP, '-', '+', 1)[1]
  local group = not oldest and redis.call('XINFO', 'GROUPS', key('stream'))[1]
  redis.call('XTRIM', key('stream'), 'MINID', oldest and oldest[1] or group[8])
  if redis.call('XLEN', key('stream')) > in_flight('') + 1000 then call_with(acknowledged, 'XDEL', key('stream')) end
end

-- Writes what was collected.
local function settle()
  if opened_permits then opened_permits.write(now_ms()) end
  for experiment, by in pairs(opened) do
    if redis.call('HINCRBY', key('open'), experiment, by) <= 0 and experiment ~= '' then
      redis.call('HDEL', key('open'), experiment)
    end
  end
  for tenant, by in pairs(places) do
    if by ~= 0 and redis.call('HINCRBY', key('places'), tenant, by) == 0 then
      redis.call('HDEL', key('places'), tenant)
    end
  end
  call_with(released, 'ZREM', key('leases'))
  call_with(texts, 'DEL')
  call_with(written, 'MSET')
  if #acknowledged > 0 then
    call_with(acknowledged, 'XACK', key('stream'), GROUP)
    drop_entries(acknowledged)
  end
  for kind, ids in pairs(events) do
    if #ids > 0 then redis.call('PUBLISH', key('events'), kind .. table.concat(ids)) end
  end
  for what in pairs(hints) do redis.call('PUBLISH', key('hints'), what) end
end
