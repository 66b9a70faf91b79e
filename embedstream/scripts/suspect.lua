-- Note the chunk of a block that is about to be tried alone, so that the next holder knows what killed this one.
--
-- KEYS 1 job hash, 2 suspect
-- ARGV 1 part, 2 block, 3 row
-- Answers {OK} | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the same note.

local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {'UNKNOWN_JOB'} end
if not is_open(state) then return {'ENDED', state} end
let_through(KEYS[1])
redis.call('HSET', KEYS[2], ARGV[1] .. ':' .. ARGV[2], ARGV[3])
return {'OK'}
