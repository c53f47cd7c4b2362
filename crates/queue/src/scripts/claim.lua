-- Feeds, then leases jobs to a worker: nothing is ever delivered without a lease. A paused lane gives none.
-- KEYS  1 lane
-- ARGV  1 worker   2 free places   3 free tokens or '', of which the last job may take more   4 lease ms
--       5 the keys that the worker has, with commas between
-- Returns a list of {id, epoch, spec, failures, started at, key to be used or ''} for each job.
local worker, free, tokens, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local started, lease_end = digits(now), digits(now + lease_ms)
local leases, ends, specs = {}, {}, {}
local mine = {}
for name in string.gmatch(ARGV[5], '[^,]+') do mine[name] = true end

local function lease(id, entry, epoch, failures, name)
  redis.call('HSET', job_key(id), 'st', RUNNING, 'ep', digits(epoch), 'wk', worker, 'sa', started, 'en', entry)
  if epoch > 1 then redis.call('DEL', text_key(id)) end
  ends[#ends + 1] = lease_end
  ends[#ends + 1] = id
  specs[#specs + 1] = spec_key(id)
  leases[#leases + 1] = { id, epoch, false, failures, now, name }
  event('t', id)
end

-- Takes entries from the stream and leases what may start. Returns how many entries it took.
local function read(count)
  local read = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count, 'STREAMS', key('stream'), '>')
  if not read then return 0 end
  local entries = read[1][2]
  for _, entry in ipairs(entries) do
    local id = entry[2][2]
    local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'fc', 'tk', 'lf', 'cr', 'gp', 'pm')
    local size = tonumber(job[4]) or 0
    local name = job[8] and string.match(job[8], '^[^+]*') or ''
    local foreign = job[8] and not mine[name]
    if job[1] ~= QUEUED then
      acknowledged[#acknowledged + 1] = entry[1]
    elseif foreign or must_wait(leaf_of(job[5])) then
      acknowledged[#acknowledged + 1] = entry[1]
      give_places(leaf_of(job[5]).tenant, 1)
      release_permit(id, { leaf = job[5], tokens = job[4], permit = job[8] }, now)
      -- Whoever has its key hears of it.
      if foreign then hint('w') end
      wait_in_backlog(job[5], { backlog_entry(id, job[4], job[6], job[7]) })
    else
      lease(id, entry[1], (tonumber(job[2]) or 0) + 1, job[3] or '0', name)
      if tokens then tokens = tokens - size end
    end
  end
  redis.call('HINCRBY', key('meta'), 'un', 0 - #entries)
  return #entries
end

if not lane_is_paused() then
  -- Cancelled jobs leave empty entries behind, so one reading may bring less than asked for. Bounded, for Redis's sake.
  local looked_at = 0
  while #leases < free and looked_at < free + 1000 and (not tokens or tokens > 0) do
    local wanted = tokens and 1 or free - #leases
    feed(now, wanted, mine)
    local entries = read(wanted)
    if entries == 0 then break end
    looked_at = looked_at + entries
  end
end
call_with(ends, 'ZADD', key('leases'))
for at = 1, #specs, 4000 do
  local found = redis.call('MGET', unpack(specs, at, math.min(at + 3999, #specs)))
  for index, spec in ipairs(found) do leases[at + index - 1][3] = spec or '' end
end
settle()
return leases
