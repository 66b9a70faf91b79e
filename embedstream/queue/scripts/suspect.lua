-- Note the chunks of a block that killed their holders, the last one being that which is about to be tried alone; or the
-- workers that died of a job's prompt, the last one being that which is about to try it.
--
-- KEYS the job's hash, suspect
-- ARGV `part:block`, or `prompt`; chunks by their place in the block, or names of workers, with commas between, or `proven`
--      of a prompt that a worker survived; '' for none
-- Answers {OK} | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the same note.

local job, suspect = unpack(KEYS)
local what, noted = unpack(ARGV)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if not is_open(state) then return {'ENDED', state} end
let_through(job)
if noted == '' then
  put('HDEL', suspect, what)
else
  put('HSET', suspect, what, noted)
end
return {'OK'}
