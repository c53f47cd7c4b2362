-- Applies settings to a lane, unless it has newer ones. May be repeated, in any order.
-- KEYS  1 lane
-- ARGV  then for each setting: name, version, value; an empty value takes the setting away
-- Returns how many were new to the lane.
local now = now_ms()
local changed = 0
for at = 1, #ARGV, 3 do
  local name, version, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local known = tonumber(string.match(redis.call('HGET', key('settings'), name) or '', '^(%d+):')) or 0
  if tonumber(version) > known then
    redis.call('HSET', key('settings'), name, version .. ':' .. value)
    changed = changed + 1
    local tenant = string.match(name, '^cap/tenant/(.+)$')
    if tenant then
      for _, flow in ipairs(redis.call('SMEMBERS', full_key(tenant))) do stand_flow(flow) end
      redis.call('DEL', full_key(tenant))
    end
  end
end
if changed > 0 then
  -- What may still not be fed is set aside again by the feed that meets it.
  for _, number in ipairs(redis.call('SMEMBERS', key('paused'))) do
    if redis.call('HEXISTS', key('leaves'), number) == 1 then stand_leaf(number) else stand_flow(number) end
  end
  redis.call('DEL', key('paused'))
  if feed(now) == 0 then hint('w') end
end
settle()
return changed
