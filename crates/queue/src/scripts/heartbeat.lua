-- Renews a worker's leases in a lane, says what it can run, and tells what became of the leases.
-- KEYS  1 lane
-- ARGV  1 worker   2 lease ms   3 places   4 free ones   5 tokens that these can hold or ''   6 what it declares of
--       keys and limits or ''   then for each lease: id, epoch, 1 when its work has started
-- Returns for each lease: o(k), l(ost), c(ancel), d(eadline passed), h(and back: another worker could start it now).
local worker, lease_ms, capacity, free, tokens = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local now = now_ms()

redis.call('HSET', key('slots'), worker, table.concat({ capacity, now + lease_ms, free, tokens, ARGV[6] }, ':'))
local idle = count_slots(now, worker)
-- While anything waits, the idle ones take that.
if #idle > 0 then
  feed(now)
  if redis.call('HGET', key('meta'), 'un') ~= '0' or redis.call('EXISTS', key('flows')) == 1 then idle = {} end
end

-- Whether another worker has room for a job. It is taken.
local function others_have_room(size)
  for _, other in ipairs(idle) do
    if other.places > 0 and other.tokens >= size then
      other.places, other.tokens = other.places - 1, other.tokens - size
      return true
    end
  end
  return false
end

local answer = {}
for at = 7, #ARGV, 3 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk', 'cx', 'dl', 'tk')
  if job[1] ~= RUNNING or job[2] ~= ARGV[at + 1] or job[3] ~= worker then
    answer[#answer + 1] = 'l'
  else
    redis.call('ZADD', key('leases'), 'XX', now + lease_ms, id)
    if job[4] then
      answer[#answer + 1] = 'c'
    elseif job[5] and tonumber(job[5]) <= now then
      answer[#answer + 1] = 'd'
    elseif ARGV[at + 2] ~= '1' and others_have_room(tonumber(job[6]) or 0) then
      answer[#answer + 1] = 'h'
    else
      answer[#answer + 1] = 'o'
    end
  end
end
settle()
return answer
