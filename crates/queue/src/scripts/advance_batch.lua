-- Writes down how far a batch is. Done is one none of whose jobs is wanted any more: it goes. May be repeated.
-- KEYS  1 lane
-- ARGV  1 worker   2 tag   3 epoch   4 state, or '' for done   5 1: it is being submitted, 0: it surely was not   6 the
--       provider's name of it or ''
-- Returns 1; 0 when it is not held by this worker any more; 2 when it is not done yet.
local name = batch_key(ARGV[2])
local batch = redis.call('HMGET', name, 'wk', 'ep', 'lv')
-- One that went before went by this very call.
if ARGV[4] == '' and not batch[1] then return 1 end
if batch[1] ~= ARGV[1] or batch[2] ~= ARGV[3] then return 0 end
if ARGV[4] == '' then
  if (tonumber(batch[3]) or 0) > 0 then return 2 end
  redis.call('DEL', name, batch_jobs_key(ARGV[2]))
  redis.call('ZREM', key('batches'), ARGV[2])
  return 1
end
redis.call('HSET', name, 'st', ARGV[4], 'rm', ARGV[6])
if ARGV[5] == '1' then redis.call('HSET', name, 'tr', 1) else redis.call('HDEL', name, 'tr') end
return 1
