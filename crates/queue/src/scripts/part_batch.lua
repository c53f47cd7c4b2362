-- Moves jobs of a batch into a new one of the same model and key. May be repeated.
-- KEYS  1 lane
-- ARGV  1 worker   2 tag   3 epoch   4 tag of the new one   5 after how many ms anybody may take that over   6 its state
--       7 who holds the jobs   8 who is to hold them   then for each job: id, epoch
-- Returns 1, or 0 when the batch is not held by this worker any more.
local now, from, to = now_ms(), batch_key(ARGV[2]), batch_key(ARGV[4])
local batch = redis.call('HMGET', from, 'wk', 'ep', 'md', 'ky')
if batch[1] ~= ARGV[1] or batch[2] ~= ARGV[3] then return 0 end
local members = {}
for at = 9, #ARGV, 2 do
  local id, epoch = ARGV[at], ARGV[at + 1]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'bt')
  if job[1] == RUNNING and job[2] == epoch and job[3] == ARGV[7] and job[4] == ARGV[2] then
    redis.call('HSET', job_key(id), 'wk', ARGV[8], 'bt', ARGV[4])
    redis.call('ZREM', batch_jobs_key(ARGV[2]), id)
    members[#members + 1] = epoch
    members[#members + 1] = id
  end
end
if #members == 0 then return 1 end
call_with(members, 'ZADD', batch_jobs_key(ARGV[4]))
redis.call('HINCRBY', from, 'lv', -#members / 2)
redis.call('HINCRBY', to, 'lv', #members / 2)
redis.call('HSETNX', to, 'ep', 0)
redis.call('HSETNX', to, 'cr', digits(now))
redis.call('HSET', to, 'wk', '', 'st', ARGV[6], 'md', batch[3], 'ky', batch[4] or '', 'sl', digits(now), 'tr', '0')
redis.call('ZADD', key('batches'), now + tonumber(ARGV[5]), ARGV[4])
return 1
