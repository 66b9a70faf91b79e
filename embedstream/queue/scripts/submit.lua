-- Add one block of a part, if it is the part's next.
--
-- KEYS the job's hash, its stream of blocks, jobs, bytes   (derived: <job>:done:<part>, <job>:sums:<part>)
-- ARGV part, block, size in bytes, bound on the queue's bytes, rows, sum (8 bytes), then the entry's fields
-- Answers {OK} | {DUPLICATE} (the block is below the next) | {GAP, next} | {ENDED, state}
--         | {FULL} (the queue is, or the job's share of it, or the server's memory)
--         | {CHANGED, block} (another content was submitted under this number) | {UNKNOWN_JOB}
-- Twice: the second run answers DUPLICATE and writes nothing.

local FIRST = 7
local job, stream, jobs, bytes = unpack(KEYS)
local part, block, size, bound, rows, sum = unpack(ARGV, 1, FIRST - 1)
block, size, bound, rows = tonumber(block), tonumber(size), tonumber(bound), tonumber(rows)
local sums = job .. ':sums:' .. part

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if not is_open(state) then return {'ENDED', state} end

local wrong = impossible_block(job, part, block)
if wrong then return wrong end
if other_content(job, part, block, sum) then return {'CHANGED', block} end

local next = number(job, 'next:' .. part)
if block < next then return {'DUPLICATE'} end
if redis.call('HEXISTS', job, 'sealed:' .. part) == 1 then return {'CHANGED', block} end
if block > next then return {'GAP', next} end

-- A block whose done bit is set came back by adoption, or was committed before the job was reopened.
local wanted = redis.call('GETBIT', job .. ':done:' .. part, block) == 0
if wanted then
  local queued = redis.pcall('GET', bytes)
  queued = type(queued) == 'string' and tonumber(queued) or 0
  if queued > 0 and queued + size > bound then return {'FULL'} end
  local own, sharing = number(job, 'queued'), redis.pcall('ZCARD', jobs)
  if type(sharing) ~= 'number' then sharing = 1 end
  if own > 0 and sharing > 1 and own + size > bound / sharing then return {'FULL'} end
end

wrong = no_counter(job, 'next:' .. part, 'added', 'submitted', 'queued')
if wrong then return wrong end
redis.call('XLEN', stream)
local first = redis.pcall('SETRANGE', sums, block * 8, sum)
if type(first) == 'table' then
  if string.find(first.err, 'OOM', 1, true) then return {'FULL'} end
  return first
end
if wanted then
  redis.call('XADD', stream, '*', unpack(ARGV, FIRST))
  put('INCRBY', bytes, size)
  redis.call('HINCRBY', job, 'queued', size)
end
redis.call('HINCRBY', job, 'next:' .. part, 1)
redis.call('HINCRBY', job, 'added', 1)
redis.call('HINCRBY', job, 'submitted', rows)
redis.call('HSET', job, 'pushed', now_ms())
return {'OK'}
