-- Say how many blocks a part has, and what was read of it. With the last part sealed the job is running; if all is done
-- already, it moves on.
--
-- KEYS the job's hash, its stream of blocks, jobs, bytes, finalize   (derived: <job>:sums:<part>)
-- ARGV job id, part, blocks, what was read (JSON: bytes or null, sha256) or ''
-- Answers {OK} | {MISSING, next} | {CHANGED, blocks} (more blocks are known) | {ENDED, state} | {UNKNOWN_JOB}
-- Twice: the second run finds the part sealed with the same count and answers OK.

local job, stream, jobs, bytes, finalize = unpack(KEYS)
local id, part, blocks, content = unpack(ARGV)
blocks = tonumber(blocks)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
local wrong = impossible_block(job, part, blocks)
if wrong then return wrong end
local sealed = redis.call('HGET', job, 'sealed:' .. part)
if sealed then return tonumber(sealed) == blocks and {'OK'} or {'CHANGED', blocks} end
if state ~= 'submitting' then return {'ENDED', state} end

local next = number(job, 'next:' .. part)
if next < blocks then return {'MISSING', next} end
-- A block at or above the end that was submitted or committed in an earlier life counts as another corpus, too: were
-- it let pass, its done bit would stand for a block that is not done.
if next > blocks or redis.call('STRLEN', job .. ':sums:' .. part) > blocks * 8 then return {'CHANGED', blocks} end

wrong = no_counter(job, 'blocks', 'sealed')
if wrong then return wrong end
let_through(job)
redis.call('HSET', job, 'sealed:' .. part, blocks, 'content:' .. part, content, 'pushed', now_ms())
redis.call('HINCRBY', job, 'blocks', blocks)
if redis.call('HINCRBY', job, 'sealed', 1) == number(job, 'parts') then
  redis.call('HSET', job, 'state', 'running')
  finish_if_done(job, id, stream, jobs, bytes, finalize)
end
return {'OK'}
