-- Say what the numbers of a job's int8 columns stand for, unless that is said already.
--
-- KEYS the job's hash
-- ARGV ranges of its int8 columns (JSON)
-- Answers {OK} (they are the job's) | {OTHER_RANGES, ranges} (those are) | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the second run answers OK.

local job = unpack(KEYS)
local ranges = unpack(ARGV)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
local known = redis.call('HGET', job, 'ranges')
if known then return known == ranges and {'OK'} or {'OTHER_RANGES', known} end
if not is_open(state) and not is_closing(job, state) then return {'ENDED', state} end
let_through(job)
redis.call('HSET', job, 'ranges', ranges)
return {'OK'}
