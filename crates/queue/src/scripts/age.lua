-- Brings flows nearer to their turn whose next job has waited long: now and then, what stands between them and the
-- lane's virtual time is halved. So even after a large charge the wait grows only with its logarithm.
-- KEYS  1 lane
-- Returns how many flows were moved.
local now = now_ms()
local meta = redis.call('HMGET', key('meta'), 'ag', 'vt')
if now - (tonumber(meta[1]) or 0) < AGING_MS then return 0 end
redis.call('HSET', key('meta'), 'ag', now)
if redis.call('EXISTS', key('gates')) == 1 then permits().forget(now, GATE_IDLE_MS) end
local virtual, moved = tonumber(meta[2]) or 0, 0
-- Those that wait longest; bounded, for Redis's sake.
local flows = redis.call('ZRANGE', key('flows'), -1000, -1, 'WITHSCORES')
for at = 1, #flows, 2 do
  local flow, time = flows[at], tonumber(flows[at + 1])
  local leaf = redis.call('ZRANGE', flow_key(flow), 0, 0)[1]
  local head = leaf and redis.call('ZRANGE', backlog_key(leaf), 0, 0, 'WITHSCORES')[2]
  if head and time > virtual and now - tonumber(head) >= AGING_MS then
    redis.call('ZADD', key('flows'), virtual + (time - virtual) / 2, flow)
    moved = moved + 1
  end
end
return moved
