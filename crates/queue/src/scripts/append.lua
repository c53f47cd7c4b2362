-- Adds text to running attempts, under the epoch check and where the attempt's text ends: a piece after one that was
-- lost is dropped, and so is one that is there already.
-- KEYS  1 lane
-- ARGV  1 worker   then for each piece: id, epoch, bytes of text before it, text
local worker = ARGV[1]
for at = 2, #ARGV, 4 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk')
  local mine = job[1] == RUNNING and job[2] == ARGV[at + 1] and job[3] == worker
  if mine and redis.call('STRLEN', text_key(id)) == tonumber(ARGV[at + 2]) then
    redis.call('APPEND', text_key(id), ARGV[at + 3])
    event('t', id)
  end
end
settle()
