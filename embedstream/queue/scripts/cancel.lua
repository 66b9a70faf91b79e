-- End a job early: drop what is queued and put it into the outbox for its partial manifest. Workers may still commit what
-- they hold of it until a program leases it there: at once if they hold nothing, or when all of that is committed, or
-- after the grace.
--
-- KEYS the job's hash, its stream of blocks, jobs, bytes, finalize
-- ARGV job id, verdict (cancelled | failed), reason, grace (ms), the consumer of released entries
-- Answers {OK} | {TOO_LATE, state} | {UNKNOWN_JOB}
-- Twice: the second run finds the same verdict and answers OK.

local job, stream, jobs, bytes, finalize = unpack(KEYS)
local id, verdict, reason, grace, nobody = unpack(ARGV)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if is_open(state) then
  local held = tonumber(grace) > 0 and in_hands(stream, nobody) or 0
  to_outbox(job, id, stream, jobs, bytes, finalize, verdict)
  redis.call('HSET', job, 'reason', reason)
  if held > 0 then
    redis.call('HSET', job, 'closing', held)
    put('ZADD', finalize, now_ms() + grace, id)
  end
  return {'OK'}
end
if state == 'finalizing' then put('ZADD', finalize, 'NX', 0, id) end -- whatever became of the outbox
if redis.call('HGET', job, 'verdict') == verdict then return {'OK'} end
return {'TOO_LATE', state}
