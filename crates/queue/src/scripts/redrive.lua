-- Decides which new jobs failed ones are redriven as: the first decision stands, so this may be repeated.
-- KEYS  1 lane
-- ARGV  ids of failed jobs and of the jobs that they may become, in turns
-- Returns for each failed job the id that it is redriven as, with an 'x' behind it when that job was purged, or '' when
--         it is not a failed job.
local answer = {}
for at = 1, #ARGV, 2 do
  local id = ARGV[at]
  if redis.call('HGET', job_key(id), 'st') ~= FAILED then
    answer[#answer + 1] = ''
  else
    redis.call('HSETNX', job_key(id), 'rd', ARGV[at + 1])
    local decided = redis.call('HMGET', job_key(id), 'rd', 'rg')
    answer[#answer + 1] = decided[1] .. (decided[2] and 'x' or '')
  end
end
return answer
