-- Note the chunks of a block that killed their holders, the last one being that which is about to be tried alone.
--
-- KEYS 1 job hash, 2 suspect
-- ARGV 1 part, 2 block, 3 chunks by their place in the block, with commas between; '' for none
-- Answers {OK} | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the same note.

local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {'UNKNOWN_JOB'} end
if not is_open(state) then return {'ENDED', state} end
let_through(KEYS[1])
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[2], ARGV[1] .. ':' .. ARGV[2])
else
  redis.call('HSET', KEYS[2], ARGV[1] .. ':' .. ARGV[2], ARGV[3])
end
return {'OK'}
