-- Note the chunks of a block that killed their holders, the last one being that which is about to be tried alone; or the
-- workers that died of a job's prompt, the last one being that which is about to try it.
--
-- KEYS 1 job hash, 2 suspect
-- ARGV 1 `part:block`, or `prompt`; 2 chunks by their place in the block, or names of workers, with commas between, or
--      `proven` of a prompt that a worker survived; '' for none
-- Answers {OK} | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the same note.

local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {'UNKNOWN_JOB'} end
if not is_open(state) then return {'ENDED', state} end
let_through(KEYS[1])
if ARGV[2] == '' then
  put('HDEL', KEYS[2], ARGV[1])
else
  put('HSET', KEYS[2], ARGV[1], ARGV[2])
end
return {'OK'}
