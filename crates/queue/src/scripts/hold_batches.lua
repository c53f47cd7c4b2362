-- Renews a worker's hold on batches, and takes over those that nobody holds.
-- KEYS  1 lane
-- ARGV  1 worker   2 lease ms; 0: lets them go   3 how many to take over at most   then for each batch that it holds: tag, epoch
-- Returns for each of these how many of its jobs are wanted still, or -1 when it is not held any more; and those taken over:
-- for each its tag and fields.
local worker, lease_end, now = ARGV[1], nil, now_ms()
lease_end = now + tonumber(ARGV[2])
local held, taken = {}, {}
for at = 4, #ARGV, 2 do
  local batch = redis.call('HMGET', batch_key(ARGV[at]), 'wk', 'ep', 'lv')
  if batch[1] == worker and batch[2] == ARGV[at + 1] then
    redis.call('ZADD', key('batches'), lease_end, ARGV[at])
    held[#held + 1] = tonumber(batch[3]) or 0
  else
    held[#held + 1] = -1
  end
end
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), '-inf', now, 'LIMIT', 0, ARGV[3])) do
  redis.call('ZADD', key('batches'), lease_end, tag)
  redis.call('HSET', batch_key(tag), 'wk', worker)
  redis.call('HINCRBY', batch_key(tag), 'ep', 1)
  taken[#taken + 1] = { tag, redis.call('HGETALL', batch_key(tag)) }
end
return { held, taken }
