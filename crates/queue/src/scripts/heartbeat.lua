-- Renews a worker's leases in a lane, says how many jobs it can run, and tells what became of the leases.
-- KEYS  1 lane
-- ARGV  1 worker   2 lease ms   3 capacity   then for each lease: id, epoch
-- Returns for each lease: o(k), l(ost), c(ancel), d(eadline passed).
local worker, lease_ms, capacity = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now = now_ms()
local answer = {}
for at = 4, #ARGV, 2 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'cx', 'dl')
  if job[1] ~= RUNNING or job[2] ~= ARGV[at + 1] or job[3] ~= worker then
    answer[#answer + 1] = 'l'
  else
    redis.call('ZADD', key('leases'), 'XX', now + lease_ms, id)
    if job[4] then
      answer[#answer + 1] = 'c'
    elseif job[5] and tonumber(job[5]) <= now then
      answer[#answer + 1] = 'd'
    else
      answer[#answer + 1] = 'o'
    end
  end
end
-- The look-ahead is twice the capacity of all live workers: a stream stays short, and no worker waits for a feed.
redis.call('HSET', key('slots'), worker, capacity .. ':' .. (now + lease_ms))
local slots, total = redis.call('HGETALL', key('slots')), 0
for at = 1, #slots, 2 do
  local size, ends = string.match(slots[at + 1], '(%d+):(%d+)')
  if tonumber(ends) <= now then
    -- A worker that died: its consumer goes once its leases have been taken back.
    if #redis.call('XPENDING', key('stream'), GROUP, '-', '+', 1, slots[at]) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', key('stream'), GROUP, slots[at])
      redis.call('HDEL', key('slots'), slots[at])
    end
  else
    total = total + tonumber(size)
  end
end
redis.call('HSET', key('meta'), 'la', total * 2)
return answer
