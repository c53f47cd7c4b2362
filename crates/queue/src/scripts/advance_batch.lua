-- Writes down how far a batch is, and renews the hold on it. Done is one none of whose jobs is wanted any more: it goes. May
-- be repeated.
-- KEYS  1 lane
-- ARGV  1 worker   2 tag   3 epoch   4 lease ms   5 state, or '' for done   6 '1': it is being submitted, '0': it surely was
--       not, and takes no more jobs, '': it was   7 the provider's name of it, or '' when that is not new   8 '1': only when
--       none of its jobs is wanted any more   9 how many items it is submitted with, or ''   then ids of jobs that are not
--       submitted with it
-- Returns 1; 0 when it is not held by this worker any more; 2 when jobs of it are wanted that must not be.
local name = batch_key(ARGV[2])
local batch = redis.call('HMGET', name, 'wk', 'ep', 'lv')
-- One that went before went by this very call.
if ARGV[5] == '' and not batch[1] then return 1 end
if batch[1] ~= ARGV[1] or batch[2] ~= ARGV[3] then return 0 end
if ARGV[8] == '1' and (tonumber(batch[3]) or 0) > 0 then return 2 end
if ARGV[5] == '' then
  redis.call('DEL', name, batch_jobs_key(ARGV[2]))
  redis.call('ZREM', key('batches'), ARGV[2])
  return 1
end
redis.call('HSET', name, 'st', ARGV[5])
if ARGV[6] ~= '' then redis.call('HSET', name, 'tr', ARGV[6]) else redis.call('HDEL', name, 'tr') end
if ARGV[7] ~= '' then redis.call('HSET', name, 'rm', ARGV[7]) end
if ARGV[9] ~= '' then redis.call('HSET', name, 'it', ARGV[9]) end
for at = 10, #ARGV do redis.call('ZREM', batch_jobs_key(ARGV[2]), ARGV[at]) end
redis.call('ZADD', key('batches'), now_ms() + tonumber(ARGV[4]), ARGV[2])
return 1
