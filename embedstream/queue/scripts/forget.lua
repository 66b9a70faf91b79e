-- Remove a damaged job, whatever lies under its keys, and count the queue's bytes anew.
--
-- KEYS 1 job hash, 2 jobs, 3 bytes, 4 finalize, 5 recent, 6 ingest, 7... all other keys below the job's
--      (derived: the hashes of the other active jobs)
-- ARGV 1 job id
-- Answers {OK}
-- Twice: nothing is left to remove.

local job, jobs, bytes, id = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
redis.call('UNLINK', job)
for i = 7, #KEYS do redis.call('UNLINK', KEYS[i]) end
for i = 2, 6 do
  if i ~= 3 then put('ZREM', KEYS[i], id) end
end
local prefix, queued = string.sub(job, 1, #job - #id), 0
for _, other in ipairs(put('ZRANGE', jobs, 0, -1)) do queued = queued + math.max(0, number(prefix .. other, 'queued')) end
if queued > 0 then redis.call('SET', bytes, string.format('%.0f', queued)) else redis.call('DEL', bytes) end
return {'OK'}
