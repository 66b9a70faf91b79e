-- Remove a damaged job, whatever lies under its keys, and count the queue's bytes again.
--
-- KEYS the job's hash, jobs, bytes, finalize, recent, ingest, then all other keys below the job's
--      (derived: the hashes of the other active jobs)
-- ARGV job id
-- Answers {OK}
-- Twice: nothing is left to remove.

local BELOW = 7
local job, jobs, bytes, finalize, recent, ingest = unpack(KEYS, 1, BELOW - 1)
local id = unpack(ARGV)

redis.call('UNLINK', job)
for i = BELOW, #KEYS do redis.call('UNLINK', KEYS[i]) end
for _, list in ipairs({jobs, finalize, recent, ingest}) do put('ZREM', list, id) end
local prefix, queued = string.sub(job, 1, #job - #id), 0
for _, other in ipairs(put('ZRANGE', jobs, 0, -1)) do queued = queued + math.max(0, number(prefix .. other, 'queued')) end
if queued > 0 then redis.call('SET', bytes, string.format('%.0f', queued)) else redis.call('DEL', bytes) end
return {'OK'}
