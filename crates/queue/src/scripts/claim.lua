-- Feeds, then leases up to `free` jobs to a worker: nothing is ever delivered without a lease.
-- KEYS  1 lane
-- ARGV  1 worker   2 free places   3 lease ms
-- Returns a list of {id, epoch, spec, failures, started at} for each job.
local worker, free, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local leases = {}
-- Cancelled jobs leave empty entries behind, so one reading may bring less than asked for. Bounded, for Redis's sake.
for _ = 1, 10 do
  local wanted = free - #leases
  if wanted <= 0 then break end
  feed(math.max(look_ahead(), wanted))
  local read = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', wanted, 'STREAMS', key('stream'), '>')
  if not read then break end
  for _, entry in ipairs(read[1][2]) do
    local id = entry[2][2]
    local job = redis.call('HMGET', job_key(id), 'st', 'en', 'fc')
    if job[1] == QUEUED and job[2] == entry[1] then
      local epoch = redis.call('HINCRBY', job_key(id), 'ep', 1)
      redis.call('HSET', job_key(id), 'st', RUNNING, 'wk', worker, 'sa', now)
      redis.call('ZADD', key('leases'), now + lease_ms, id)
      redis.call('DEL', text_key(id))
      leases[#leases + 1] = { id, epoch, redis.call('GET', spec_key(id)), job[3] or '0', now }
      event('t', id)
    else
      redis.call('XACK', key('stream'), GROUP, entry[1])
      redis.call('XDEL', key('stream'), entry[1])
    end
  end
  redis.call('HINCRBY', key('meta'), 'un', -#read[1][2])
end
return leases
