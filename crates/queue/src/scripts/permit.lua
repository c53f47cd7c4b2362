-- Gives a permit to a call beside the one for which a job was fed: to another model, or the same again.
-- KEYS  1 lane
-- ARGV  1 a name for the call   2 model   3 estimated tokens   4 the keys that the worker has, with commas between
--       5 ms after which the permit ends by itself
-- Returns {permit, key}; or {'', when or '' for when a call ends, why}; or nothing where there are no gates.
local now = now_ms()
if (redis.call('HGET', key('meta'), 'gt') or '') == '' then return {} end
local mine = {}
for name in string.gmatch(ARGV[4], '[^,]+') do mine[name] = true end
local lent, detail, why = permits().lend(ARGV[1], ARGV[2], tonumber(ARGV[3]), now, mine, now + tonumber(ARGV[5]))
settle()
if not lent then return { '', detail, why } end
return { lent, detail }
