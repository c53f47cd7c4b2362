-- Ends a permit that was given to a call beside a job's own. May be repeated.
-- KEYS  1 lane
-- ARGV  1 permit   2 what the call tells, or '' when it was not made
local now = now_ms()
permits().settle(ARGV[1], now, ARGV[2] ~= '' and cmsgpack.unpack(ARGV[2]) or nil)
feed(now)
settle()
