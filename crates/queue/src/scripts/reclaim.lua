-- Takes running jobs back whose leases have run out: each counts a loss, and is queued again or fails as poison.
-- KEYS  1 lane
-- ARGV  1 most jobs   2 losses that make poison   3 how the attempt ended   4 failure class   5 failure message
--       6 for how many ms leases are left alone when nobody has looked for a while
-- Returns how many were taken back.
local now = now_ms()
-- What kept everybody from looking may have kept workers from their heartbeats.
local looked = redis.call('HMGET', key('meta'), 'rc', 'rw')
local wait_until = tonumber(looked[2]) or 0
if now - (tonumber(looked[1]) or 0) > RECLAIM_GAP_MS then wait_until = now + tonumber(ARGV[6]) end
redis.call('HSET', key('meta'), 'rc', digits(now), 'rw', digits(wait_until))
count_slots(now)
if now < wait_until then return 0 end
local lost = redis.call('ZRANGEBYSCORE', key('leases'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(lost) do
  local job = read_job(id)
  if job.state == RUNNING then
    local lease = redis.call('HMGET', job_key(id), 'ep', 'wk', 'en', 'sa')
    release(id, job, lease[3])
    -- Its call did happen, as far as anybody knows.
    release_permit(id, job, now, tonumber(lease[4]), { signal = 'given_up' })
    local losses = redis.call('HINCRBY', job_key(id), 'lc', 1)
    local attempt = {
      epoch = tonumber(lease[1]), worker = lease[2], started_at = tonumber(lease[4]), ended_at = now, ['end'] = ARGV[3],
    }
    local poison = losses >= tonumber(ARGV[2])
    book(id, attempt, nil, poison and ARGV[4], ARGV[5])
    if poison then finish_job(id, job, FAILED, now) else queue_again(id, job, now) end
  else
    redis.call('ZREM', key('leases'), id)
  end
end
-- So are the permits of those who did not settle them.
local lent = redis.call('ZRANGEBYSCORE', key('lent'), '-inf', now, 'LIMIT', 0, ARGV[1])
for _, permit in ipairs(lent) do permits().settle(permit, now, { signal = 'given_up' }) end
if #lost + #lent > 0 then feed(now) end
settle()
return #lost
