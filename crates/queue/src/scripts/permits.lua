-- The permits of a lane: a job of a remote model is fed with a key whose gates it passes, and its permit ends with its
-- place. Leaves whose jobs may not go are set aside until a time, or until a call of their model ends. Made only where
-- live workers have declared keys or a job has a permit; it uses what stands in gates.lua.
local lane = { keys = {}, start = 1, limits = {} }
local stored_lane = redis.call('HGET', key('meta'), 'gt')
if stored_lane and stored_lane ~= '' then lane = cmsgpack.unpack(stored_lane) end

-- In place of a permit: the job's own model is held back and asked nothing, others answer. Only workers that know of them
-- have it among their keys.
local SPARED = '~'
local covered = { throttled = {}, failing = {} }
for why, models in pairs(lane.covered or {}) do
  for _, model in ipairs(models) do covered[why][model] = true end
end

local limits_of, NO_LIMITS = {}, {}
for _, limit in ipairs(lane.limits) do limits_of[limit.model] = limit end

-- So many leaves of a model are tried again at once; bounded, because each costs several commands.
local WAKE_MAX = 16
-- The others, and those that wait for a call to end, are tried again after so long in any case.
local WAKE_OTHERS_MS, WAKE_ANYHOW_MS = 250, 60000

local gates, changed, woken, passed_over = {}, {}, {}, {}

-- The model of leaves that were made before leaves had one.
local UNKNOWN = '?'
local function model_of(leaf)
  leaf.model = leaf.model or redis.call('HGET', key('models'), leaf.number) or UNKNOWN
  return leaf.model
end

local function gate_of(name, model)
  local full = name .. ':' .. model
  if not gates[full] then
    local stored = redis.call('HGET', key('gates'), full)
    gates[full] = stored and cmsgpack.unpack(stored) or fresh(model ~= '' and lane.start or nil)
  end
  return gates[full], limits_of[model] or NO_LIMITS
end

local function change(name, model, now)
  local full = name .. ':' .. model
  gates[full].touched = now
  changed[full] = true
end

-- Tries a model's leaves again that were set aside.
local function wake(model, now)
  redis.call('ZREM', key('shut'), model)
  local numbers = redis.call('ZRANGE', shut_key(model), 0, WAKE_MAX - 1)
  if #numbers == 0 then return end
  redis.call('ZREM', shut_key(model), unpack(numbers))
  for _, number in ipairs(numbers) do stand_leaf(number) end
  if #numbers == WAKE_MAX then redis.call('ZADD', key('shut'), 'NX', now + WAKE_OTHERS_MS, model) end
end

local function wake_ended(now)
  for model in pairs(woken) do wake(model, now) end
  woken = {}
end

-- The key with which a job of so many tokens may go now, the one that has most room left; else nil, and when one has
-- room and what it waits for. `mine` are the keys that count. Then true when only another key has room, and which key
-- has room first.
local function choose(model, tokens, now, mine, id)
  local best, most, earliest, why, elsewhere, first = nil, -math.huge, math.huge, '', false, nil
  for _, name in ipairs(lane.keys) do
    local gate, limits = gate_of(name, model)
    local at, what = opens(gate, limits, tokens, now, id)
    local left = room(gate, limits, tokens, now)
    if limits_of[''] then
      local all, all_limits = gate_of(name, '')
      local all_at, all_what = opens(all, all_limits, tokens, now, id)
      if all_at > at then at, what = all_at, all_what end
      left = math.min(left, room(all, all_limits, tokens, now))
    end
    if at > now then
      if at < earliest or why == '' then earliest, why, first = at, what, name end
    elseif mine and not mine[name] then
      elsewhere = true
    elseif left > most then
      best, most = name, left
    end
  end
  return best, earliest, why, elsewhere, first
end

-- Saves up tokens for the next job of a leaf with the key that has room for it first. True when that is so.
local function save(model, tokens, now, id, name)
  local saves = false
  for _, of in ipairs(limits_of[''] and { model, '' } or { model }) do
    local gate, limits = gate_of(name, of)
    if save_up(gate, limits, tokens, now, id) then
      change(name, of, now)
      saves = true
    end
  end
  return saves
end

local permits = {}

-- Tries those leaves again whose time has come, and those of models of which a call has ended.
function permits.wake(now)
  for _, model in ipairs(redis.call('ZRANGEBYSCORE', key('shut'), '-inf', now, 'LIMIT', 0, WAKE_MAX)) do
    woken[model] = true
  end
  wake_ended(now)
end

-- Tries all of them again.
function permits.open(now)
  for _, model in ipairs(redis.call('ZRANGE', key('shut'), 0, -1)) do
    while redis.call('EXISTS', shut_key(model)) == 1 do wake(model, now) end
  end
end

-- Lets a call through with a key that has room, whose id is `id`. Returns its permit; else nil, and as `choose` does.
local function grant(id, model, tokens, now, mine)
  local name, at, why, elsewhere, first = choose(model, tokens, now, mine, id)
  if not name then return nil, at, why, elsewhere, first end
  local gate, limits = gate_of(name, model)
  pass(gate, limits, tokens, now, id)
  change(name, model, now)
  if not limits_of[''] then return name end
  local all, all_limits = gate_of(name, '')
  pass(all, all_limits, tokens, now, id)
  change(name, '', now)
  -- It ends there too, whatever is configured then.
  return name .. '+'
end

-- Ends a permit. `told` is what the call tells; nil when none was made: then all of it is given back.
local function give_back(id, model, permit, tokens, now, started, told)
  if permit == SPARED then return end
  local name, plus = string.match(permit, '^([^+]*)(%+?)$')
  for _, of in ipairs(plus == '' and { model } or { model, '' }) do
    local gate, limits = gate_of(name, of)
    if told then ended(gate, limits, tokens, now, id, started, told) else take_back(gate, limits, tokens, now, id) end
    change(name, of, now)
  end
  woken[model] = true
  if plus ~= '' then
    for _, other in ipairs(redis.call('ZRANGE', key('shut'), 0, WAKE_MAX - 1)) do woken[other] = true end
  end
end

-- Takes the next job of a leaf out of its backlog and gives it a permit. Returns member and score, or nothing: then the
-- leaf has no job, or is to stand down.
function permits.pop(leaf, now, mine)
  local head = redis.call('ZRANGE', backlog_key(leaf.number), 0, 0, 'WITHSCORES')
  if not head[1] then return head end
  local id, tokens = job_of(head[1])
  local model = model_of(leaf)
  local permit, at, why, elsewhere, first = grant(id, model, tokens, now, mine)
  if not permit and not elsewhere and covered[why] and covered[why][model] then
    if mine and not mine[SPARED] then elsewhere = true else permit = SPARED end
  end
  if permit then
    redis.call('ZREM', backlog_key(leaf.number), head[1])
    redis.call('HSET', job_key(id), 'pm', permit)
    return head
  end
  if elsewhere then
    passed_over[#passed_over + 1] = leaf.number
  else
    -- Of those that are set aside, the one for which tokens are saved up is tried again first.
    local saves = why == 'tokens' and save(model, tokens, now, id, first)
    redis.call('ZADD', shut_key(model), saves and 0 or now, leaf.number)
    redis.call('ZADD', key('shut'), 'LT', at == math.huge and now + WAKE_ANYHOW_MS or at, model)
  end
  return {}
end

-- Ends the permit of a job, as `give_back` does.
function permits.release(id, leaf, permit, tokens, now, started, told)
  redis.call('HDEL', job_key(id), 'pm')
  give_back(id, model_of(leaf), permit, math.min(tonumber(tokens) or 1, 16777215), now, started, told)
end

-- Gives a permit to a call beside a job's own, until `ends` at most. Returns it with its key; else nil, when and why.
function permits.lend(id, model, tokens, now, mine, ends)
  local permit, at, why = grant(id, model, tokens, now, mine)
  if not permit then return nil, at < math.huge and digits(at) or '', why end
  local lent = cmsgpack.pack({ id, model, permit, tokens, now })
  redis.call('ZADD', key('lent'), ends, lent)
  return lent, (string.match(permit, '^[^+]*'))
end

-- Ends such a permit, unless that has happened.
function permits.settle(lent, now, told)
  if redis.call('ZREM', key('lent'), lent) == 0 then return end
  local id, model, permit, tokens, started = unpack(cmsgpack.unpack(lent))
  give_back(id, model, permit, tokens, now, started, told)
end

-- How the gates stand: for each key, model, calls with a permit, window, when a small job may pass (0 now, '' when a
-- call ends) and what it waits for. Then for each model that is held back, or that its provider keeps from being called:
-- model, when, what for.
function permits.show(now)
  local shown, held, tries = {}, {}, {}
  local function time(at) return at <= now and '0' or at < math.huge and digits(at) or '' end
  for _, full in ipairs(redis.call('HKEYS', key('gates'))) do
    local name, model = string.match(full, '^([^:]*):(.*)$')
    local gate, limits = gate_of(name, model)
    local at, why = opens(gate, limits, 1, now)
    local most = window(gate, limits)
    shown[#shown + 1] = { name, model, gate.in_flight, most < math.huge and digits(most) or '', time(at), why }
    if model ~= '' and (why == 'throttled' or why == 'failing') then tries[model] = 0 end
  end
  local shut = redis.call('ZRANGE', key('shut'), 0, -1, 'WITHSCORES')
  for index = 1, #shut, 2 do tries[shut[index]] = tonumber(shut[index + 1]) end
  for model, tried in pairs(tries) do
    local name, at, why = choose(model, 1, now)
    -- Those that wait may be larger.
    if name and tried > now then at, why = tried, 'tokens' end
    if at < math.huge then at = math.max(at, tried) end
    if at > now and why ~= '' then held[#held + 1] = { model, time(at), why } end
  end
  return { shown, held }
end

-- Forgets gates that nobody has passed for so long.
function permits.forget(now, idle_ms)
  for _, full in ipairs(redis.call('HKEYS', key('gates'))) do
    local gate = gate_of(string.match(full, '^([^:]*):(.*)$'))
    if gate.in_flight == 0 and now - (gate.touched or 0) > idle_ms then redis.call('HDEL', key('gates'), full) end
  end
end

-- Writes what has changed.
function permits.write(now)
  wake_ended(now)
  for _, number in ipairs(passed_over) do stand_leaf(number) end
  passed_over = {}
  for full in pairs(changed) do redis.call('HSET', key('gates'), full, cmsgpack.pack(gates[full])) end
  changed = {}
end

return permits
