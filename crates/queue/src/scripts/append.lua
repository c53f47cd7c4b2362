-- Adds text to running attempts, under the epoch check and where the attempt's text ends: a piece after one that was
-- lost is dropped, and so is one that is there already.
-- KEYS  1 lane
-- ARGV  1 worker   then for each piece: id, epoch, bytes of text before it, text
-- Returns for each piece how many bytes of its attempt's text are stored now, -1 when the lease was lost.
local worker = ARGV[1]
local stored = {}
for at = 2, #ARGV, 4 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk')
  local bytes = -1
  if job[1] == RUNNING and job[2] == ARGV[at + 1] and job[3] == worker then
    bytes = redis.call('STRLEN', text_key(id))
    if bytes == tonumber(ARGV[at + 2]) then
      bytes = redis.call('APPEND', text_key(id), ARGV[at + 3])
      event('t', id)
    end
  end
  stored[#stored + 1] = bytes
end
settle()
return stored
