-- End a job early: drop what is queued and put it into the outbox for its partial manifest.
--
-- KEYS the job's hash, its stream of blocks, jobs, bytes, finalize
-- ARGV job id, verdict (cancelled | failed), reason
-- Answers {OK} | {TOO_LATE, state} | {UNKNOWN_JOB}
-- Twice: the second run finds the same verdict and answers OK.

local job, stream, jobs, bytes, finalize = unpack(KEYS)
local id, verdict, reason = unpack(ARGV)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if is_open(state) then
  to_outbox(job, id, stream, jobs, bytes, finalize, verdict)
  redis.call('HSET', job, 'reason', reason)
  return {'OK'}
end
if state == 'finalizing' then put('ZADD', finalize, 'NX', 0, id) end -- whatever became of the outbox
if redis.call('HGET', job, 'verdict') == verdict then return {'OK'} end
return {'TOO_LATE', state}
