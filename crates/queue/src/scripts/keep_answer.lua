-- Keeps an answer for a while. The oldest of the tenant go where all together would be too large.
-- KEYS  1 tenant
-- ARGV  1 hash of the request   2 answer   3 ms for which it is kept   4 the most bytes of all
local hash, answer, ttl_ms, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
-- So many go in one call at most: bounds the time it takes.
local GO_MAX = 1000
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local total = tonumber(redis.call('GET', key('answers-bytes'))) or 0
local function member_of(name, size) return name .. struct.pack('>I4', size) end
local function let_go(member)
  if redis.call('ZREM', key('answers'), member) == 0 then return end
  total = total - struct.unpack('>I4', string.sub(member, -4))
end

-- These have gone by themselves.
for _, member in ipairs(redis.call('ZRANGEBYSCORE', key('answers'), '-inf', now, 'LIMIT', 0, GO_MAX)) do let_go(member) end
let_go(member_of(hash, redis.call('STRLEN', answer_key(hash))))
redis.call('DEL', answer_key(hash))
if #answer <= most then
  for _ = 1, GO_MAX do
    local oldest = total + #answer > most and redis.call('ZRANGE', key('answers'), 0, 0)[1]
    if not oldest then break end
    let_go(oldest)
    redis.call('DEL', answer_key(string.sub(oldest, 1, -5)))
  end
  if total + #answer <= most then
    redis.call('SET', answer_key(hash), answer, 'PX', ttl_ms)
    redis.call('ZADD', key('answers'), now + ttl_ms, member_of(hash, #answer))
    total = total + #answer
  end
end
redis.call('SET', key('answers-bytes'), string.format('%d', math.max(0, total)), 'KEEPTTL')
-- They last as long as whatever they tell of.
for _, name in ipairs({ key('answers-bytes'), key('answers') }) do
  if redis.call('PTTL', name) < ttl_ms then redis.call('PEXPIRE', name, ttl_ms) end
end
