-- Adds text to running attempts, under the epoch check.
-- KEYS  1 lane
-- ARGV  1 worker   then for each piece: id, epoch, text
-- Returns for each piece 1 when added, 0 when the lease was lost.
local worker = ARGV[1]
local answer = {}
for at = 2, #ARGV, 3 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'st', 'ep', 'wk')
  if job[1] == RUNNING and job[2] == ARGV[at + 1] and job[3] == worker then
    redis.call('APPEND', text_key(id), ARGV[at + 2])
    event('t', id)
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
settle()
return answer
