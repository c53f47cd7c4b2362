-- Moves jobs of one model out of their leases into a batch, which is made when it is new. They run on, held by the
-- batch: its holder ends them, whoever that is then.
-- KEYS  1 lane
-- ARGV  1 worker   2 tag   3 state of a new batch   4 model   5 key or ''   6 lease of the batch in ms   7 for how many ms it is
--       filled   8 who holds its jobs   then for each lease: id, epoch
-- Returns for each lease 1 when its job is in the batch or has ended, 0 when the lease was lost. Nothing when the batch is
-- not this worker's any more, or not to be filled any more.
local worker, tag, now = ARGV[1], ARGV[2], now_ms()
local batch = redis.call('HMGET', batch_key(tag), 'wk', 'st', 'tr')
if batch[1] and (batch[1] ~= worker or batch[2] ~= ARGV[3] or batch[3]) then return nil end
if not batch[1] then
  redis.call('HSET', batch_key(tag), 'wk', worker, 'st', ARGV[3], 'ep', 1, 'md', ARGV[4], 'ky', ARGV[5],
    'cr', digits(now), 'sl', digits(now + tonumber(ARGV[7])))
  redis.call('ZADD', key('batches'), now + tonumber(ARGV[6]), tag)
end
local answer, members = {}, {}
for at = 9, #ARGV, 2 do
  local id, epoch = ARGV[at], ARGV[at + 1]
  local lease = redis.call('HMGET', job_key(id), 'ep', 'wk', 'en')
  local job = read_job(id)
  if job.state ~= RUNNING or lease[1] ~= epoch or lease[2] ~= worker then
    -- Or this very call was made before.
    answer[#answer + 1] = job.batch == tag and 1 or 0
  else
    release(id, job, lease[3])
    release_permit(id, job, now)
    if job.cancelled then
      finish_job(id, job, CANCELLED, now)
    elseif job.deadline and tonumber(job.deadline) <= now then
      finish_job(id, job, EXPIRED, now)
    else
      redis.call('HSET', job_key(id), 'wk', ARGV[8], 'bt', tag)
      members[#members + 1] = epoch
      members[#members + 1] = id
    end
    answer[#answer + 1] = 1
  end
end
call_with(members, 'ZADD', batch_jobs_key(tag))
redis.call('HINCRBY', batch_key(tag), 'lv', #members / 2)
redis.call('HINCRBY', key('meta'), 'bt', #members / 2)
settle()
return answer
