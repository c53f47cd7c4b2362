-- What a gate decides. A gate bounds the calls with one key for one remote model, or with '' in its place for all models
-- of a key. Nothing here calls Redis: all of it follows from a gate, what is configured, and the time in ms.
--
-- A gate has: in_flight, calls that have a permit; window, the most of them, which adapts; grown, answers since it grew
-- last; shrunk_at; growth_from, until when growth pauses; throttles, episodes without an answer between; blocked_until;
-- errors in a row; open_until and openings of the circuit breaker; opened_at; probe, the job that tries whether the
-- provider is back; requests and tokens, buckets of limit and rate per ms as the provider told, level, and at, the time
-- of that level; saved, the job for which tokens are saved up, with its size and until when at most. What is configured has: requests and tokens per minute, concurrency.
local MINUTE_MS = 60000
-- A throttled window keeps so much of itself.
local SHRINK = 0.7
local GROWTH_PAUSE_MS = 10000
-- For how long a gate is shut that was throttled without being told: doubled with each episode.
local BACKOFF_MS, BACKOFF_MS_MAX = 1000, 60000
-- A provider that says "again at once" time after time is asked ever less, down to once in the longest of these.
local AGAIN_MS, AGAIN_MS_MAX = 50, 1000
-- So many errors in a row open the circuit breaker, for a time that is doubled whenever a probe fails.
local ERRORS_MAX, OPEN_MS, OPEN_MS_MAX = 5, 2000, 300000
-- When a probe takes longer, another is made.
local PROBE_MS = 30000
-- A job for which tokens were saved up may be gone: so long after its time others go in its place.
local SAVED_MS = 1000

local function doubled(first, times, longest)
  return math.min(longest, first * 2 ^ math.min(times, 16))
end

local function fresh(start)
  return { in_flight = 0, window = start, requests = {}, tokens = {} }
end

-- What a bucket holds when full, and what flows into it in a ms: never more than is configured.
local function bounds(bucket, per_minute)
  local limit = math.min(bucket.limit or math.huge, per_minute or math.huge)
  local rate = bucket.rate or (bucket.limit or math.huge) / MINUTE_MS
  return limit, math.min(rate, (per_minute or math.huge) / MINUTE_MS)
end

-- What a bucket holds; math.huge when nothing bounds it.
local function level(bucket, per_minute, now)
  local limit, rate = bounds(bucket, per_minute)
  if limit == math.huge or not bucket.at then return limit end
  return math.min(limit, bucket.level + math.max(0, now - bucket.at) * rate)
end

-- Puts `amount` into a bucket; takes it out when negative. A debt is left to be filled up.
local function pour(bucket, per_minute, amount, now)
  local held = level(bucket, per_minute, now)
  if held == math.huge then return end
  bucket.level, bucket.at = math.min(held + amount, (bounds(bucket, per_minute))), now
end

-- When a bucket holds `size`. What is larger than the whole bucket goes when that is half full: it would never be full
-- while smaller ones pass.
local function filled_at(bucket, per_minute, size, now)
  local limit, rate = bounds(bucket, per_minute)
  if limit == math.huge then return now end
  local missing = (size > limit and limit / 2 or size) - level(bucket, per_minute, now)
  return missing <= 1e-6 and now or now + math.ceil(missing / rate)
end

-- When there are tokens for a job. Those that are saved up for another are not taken from it: smaller jobs would keep the
-- bucket empty for which a larger one waits. Without `id`: for the next that goes, whoever it is.
local function affords_at(gate, limits, tokens, now, id)
  local saved = gate.saved
  if not saved or not id or saved.id == id or now >= saved.ends then
    return filled_at(gate.tokens, limits.tokens, tokens, now)
  end
  local _, rate = bounds(gate.tokens, limits.tokens)
  return filled_at(gate.tokens, limits.tokens, saved.tokens, now) + math.ceil(tokens / rate)
end

-- From now on saves up tokens for a job that waits for them, unless that is done for another.
local function save_up(gate, limits, tokens, now, id)
  if gate.saved and gate.saved.id ~= id and now < gate.saved.ends then return false end
  local at = filled_at(gate.tokens, limits.tokens, tokens, now)
  if at <= now then return false end
  gate.saved = { id = id, tokens = tokens, ends = at + SAVED_MS }
  return true
end

-- The most calls at once.
local function window(gate, limits)
  return math.min(gate.window or math.huge, limits.concurrency or math.huge)
end

-- When a job of so many tokens may go, math.huge for when a call ends; and what it waits for until then.
local function opens(gate, limits, tokens, now, id)
  local at, why = now, ''
  local function wait(until_ms, what)
    if until_ms and until_ms > at then at, why = until_ms, what end
  end
  wait(gate.blocked_until, 'throttled')
  wait(gate.open_until, 'failing')
  wait(filled_at(gate.requests, limits.requests, 1, now), 'requests')
  wait(affords_at(gate, limits, tokens, now, id), 'tokens')
  if gate.in_flight >= window(gate, limits) then wait(math.huge, 'calls') end
  return at, why
end

-- How many jobs of so many tokens could go now.
local function room(gate, limits, tokens, now)
  local requests, held = level(gate.requests, limits.requests, now), level(gate.tokens, limits.tokens, now)
  return math.min(window(gate, limits) - gate.in_flight, requests, held / math.max(1, tokens))
end

-- Lets a job pass.
local function pass(gate, limits, tokens, now, id)
  gate.in_flight = gate.in_flight + 1
  pour(gate.requests, limits.requests, -1, now)
  pour(gate.tokens, limits.tokens, -tokens, now)
  if gate.saved and gate.saved.id == id then gate.saved = nil end
  if gate.open_until then gate.open_until, gate.probe = now + PROBE_MS, id end
end

-- Takes a job back whose call was not made.
local function take_back(gate, limits, tokens, now, id)
  gate.in_flight = math.max(0, gate.in_flight - 1)
  pour(gate.requests, limits.requests, 1, now)
  pour(gate.tokens, limits.tokens, tokens, now)
  if gate.probe == id then gate.open_until, gate.probe = now, nil end
end

-- What a provider told of a bucket `age` ms ago. What is left only lowers what we count ourselves, because calls were
-- charged since; `others` is what else may have been taken before anything was counted.
local function learn(bucket, per_minute, told, age, others, now)
  local limit, remaining = told.limit or bucket.limit, told.remaining
  if remaining and (not limit or not told.limit and remaining > limit) then limit = remaining end
  if not limit or limit <= 0 then return end
  local first = level(bucket, per_minute, now) == math.huge
  local rate = bucket.limit == limit and bucket.rate or nil
  -- Of a bucket that is nearly full, rounding would tell more than the provider does.
  local missing = remaining and limit - remaining or 0
  if missing * 20 >= limit and (told.reset_ms or 0) > 0 then rate = missing / told.reset_ms end
  bucket.limit, bucket.rate = limit, rate
  if not remaining then return end
  local _, flow = bounds(bucket, per_minute)
  local left = remaining + age * flow - (first and others or 0)
  bucket.level, bucket.at = math.min(level(bucket, per_minute, now), left), now
end

local function answered(gate, in_flight, now)
  gate.errors, gate.throttles, gate.openings, gate.open_until, gate.probe = nil, nil, nil, nil, nil
  -- What is not used up tells nothing about more.
  if in_flight * 2 < gate.window or now < (gate.growth_from or 0) then return end
  gate.grown = (gate.grown or 0) + 1
  -- Until it was throttled first, it doubles as often as all calls are answered; then it grows by one.
  if not gate.shrunk_at or gate.grown >= gate.window then gate.window, gate.grown = gate.window + 1, 0 end
end

local function throttled(gate, in_flight, started, asked_ms, now)
  -- It is there.
  gate.errors, gate.openings, gate.open_until, gate.probe = nil, nil, nil, nil
  local shut_ms = asked_ms or 0
  -- Calls that began before the window shrank say nothing about the new one.
  if not gate.shrunk_at or started >= gate.shrunk_at then
    gate.window = math.max(1, math.floor(math.min(gate.window, in_flight) * SHRINK))
    gate.shrunk_at, gate.grown, gate.throttles = now, 0, (gate.throttles or 0) + 1
    if not asked_ms then
      shut_ms = doubled(BACKOFF_MS, gate.throttles - 1, BACKOFF_MS_MAX)
    elseif gate.throttles > 1 then
      shut_ms = math.max(asked_ms, doubled(AGAIN_MS, gate.throttles - 2, AGAIN_MS_MAX))
    end
  end
  gate.blocked_until = math.max(gate.blocked_until or 0, now + shut_ms)
end

local function overloaded(gate, started, asked_ms, now)
  gate.growth_from, gate.grown = now + GROWTH_PAUSE_MS, 0
  if asked_ms then gate.blocked_until = math.max(gate.blocked_until or 0, now + asked_ms) end
  -- Calls that began before the circuit opened say nothing new.
  if gate.open_until and started < gate.opened_at then return end
  gate.errors = (gate.errors or 0) + 1
  if gate.errors < ERRORS_MAX and not gate.open_until then return end
  gate.openings = (gate.openings or 0) + 1
  gate.open_until = now + doubled(OPEN_MS, gate.openings - 1, OPEN_MS_MAX)
  gate.opened_at, gate.probe = now, nil
end

-- A call has ended that started at `started`, with what it tells. A gate of all models learns nothing of one.
local function ended(gate, limits, tokens, now, id, started, told)
  local in_flight = gate.in_flight
  gate.in_flight = math.max(0, in_flight - 1)
  if told.used_tokens then pour(gate.tokens, limits.tokens, tokens - told.used_tokens, now) end
  if gate.probe == id and told.signal == 'given_up' then gate.open_until, gate.probe = now, nil end
  if not gate.window then return end
  if told.requests then learn(gate.requests, limits.requests, told.requests, told.age_ms, gate.in_flight, now) end
  if told.tokens then learn(gate.tokens, limits.tokens, told.tokens, told.age_ms, 0, now) end
  if told.signal == 'answered' then
    answered(gate, in_flight, now)
  elseif told.signal == 'throttled' then
    throttled(gate, in_flight, started, told.retry_after_ms, now)
  elseif told.signal == 'overloaded' then
    overloaded(gate, started, told.retry_after_ms, now)
  end
end
