-- End a job early: drop what is queued and put it into the outbox for its partial manifest.
--
-- KEYS 1 job hash, 2 blocks stream, 3 jobs, 4 bytes, 5 finalize
-- ARGV 1 job id, 2 verdict (cancelled | failed), 3 reason
-- Answers {OK} | {TOO_LATE, state} | {UNKNOWN_JOB}
-- Twice: the second run finds the same verdict and answers OK.

local job = KEYS[1]
local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if is_open(state) then
  to_outbox(job, ARGV[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2])
  redis.call('HSET', job, 'reason', ARGV[3])
  return {'OK'}
end
if state == 'finalizing' then put('ZADD', KEYS[5], 'NX', 0, ARGV[1]) end -- whatever became of the outbox
if redis.call('HGET', job, 'verdict') == ARGV[2] then return {'OK'} end
return {'TOO_LATE', state}
