-- Feeds, then leases up to `free` jobs to a worker: nothing is ever delivered without a lease.
-- KEYS  1 lane
-- ARGV  1 worker   2 free places   3 lease ms
-- Returns a list of {id, epoch, spec, failures, started at} for each job.
local worker, free, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local leases, ends, specs = {}, {}, {}
-- Cancelled jobs leave empty entries behind, so one reading may bring less than asked for. Bounded, for Redis's sake.
for _ = 1, 10 do
  local wanted = free - #leases
  if wanted <= 0 then break end
  feed(math.max(look_ahead(), wanted))
  local read = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', wanted, 'STREAMS', key('stream'), '>')
  if not read then break end
  for _, entry in ipairs(read[1][2]) do
    local id = entry[2][2]
    local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'fc')
    if job[1] == QUEUED then
      local epoch = (tonumber(job[2]) or 0) + 1
      redis.call('HSET', job_key(id), 'st', RUNNING, 'ep', epoch, 'wk', worker, 'sa', now, 'en', entry[1])
      if epoch > 1 then redis.call('DEL', text_key(id)) end
      ends[#ends + 1] = now + lease_ms
      ends[#ends + 1] = id
      specs[#specs + 1] = spec_key(id)
      leases[#leases + 1] = { id, epoch, false, job[3] or '0', now }
      event('t', id)
    else
      acknowledged[#acknowledged + 1] = entry[1]
    end
  end
  redis.call('HINCRBY', key('meta'), 'un', -#read[1][2])
end
call_with(ends, 'ZADD', key('leases'))
for at = 1, #specs, 4000 do
  local found = redis.call('MGET', unpack(specs, at, math.min(at + 3999, #specs)))
  for index, spec in ipairs(found) do leases[at + index - 1][3] = spec or '' end
end
settle()
return leases
