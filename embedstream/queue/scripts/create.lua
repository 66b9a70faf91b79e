-- Make a job, find it, or reopen one that was cancelled or failed. One that was cancelled or failed before it had a
-- single row holds its output no longer: another spec takes its place.
--
-- KEYS the job's hash, jobs, its stream of blocks, shards, suspect, recent
--      (derived: <job>:done:<part>, <job>:sums:<part>)
-- ARGV job id, spec (canonical JSON), max errors, number of parts, the space that its vectors must be of, or ''
-- Answers {CREATED} | {REOPENED} | {EXISTS, state} | {DIFFERS, existing spec}
-- Twice: the second run finds the job as the first one left it and answers EXISTS(submitting).

local job, jobs, stream, shards, suspect, recent = unpack(KEYS)
local id, spec, max_errors, parts, space = unpack(ARGV)
parts = tonumber(parts)

local existing = redis.call('HGET', job, 'spec')
local state = redis.call('HGET', job, 'state')
if existing and existing ~= spec then
  local fruitless = (state == 'cancelled' or state == 'failed') and number(job, 'rows') == 0
  if not fruitless then return {'DIFFERS', existing} end
  for part = 0, parts_of(job) - 1 do
    redis.call('UNLINK', job .. ':done:' .. part, job .. ':sums:' .. part)
  end
  redis.call('UNLINK', job)
  existing = false
end
if existing and state ~= 'cancelled' and state ~= 'failed' then
  if is_open(state) then redis.call('HSET', job, 'max_errors', max_errors) end
  return {'EXISTS', state}
end

local now = now_ms()
if existing then
  local wrong = no_counter(job, 'epoch')
  if wrong then return wrong end
  -- Committed blocks keep their done bits; everything else is submitted again.
  redis.call('PERSIST', job)
  redis.call('PERSIST', shards)
  -- Its entries are new and so are their delivery counts; a note about the old ones would condemn an innocent chunk.
  redis.call('UNLINK', suspect)
  for part = 0, parts - 1 do
    redis.call('HDEL', job, 'next:' .. part, 'sealed:' .. part, 'content:' .. part)
    redis.call('PERSIST', job .. ':done:' .. part)
    redis.call('PERSIST', job .. ':sums:' .. part)
  end
  redis.call('HINCRBY', job, 'epoch', 1)
else
  -- Epochs start at the time in microseconds, so that a lease from before Redis was emptied is stale.
  local time = redis.call('TIME')
  local epoch = time[1] .. string.format('%06d', time[2])
  redis.call('UNLINK', shards, suspect)
  for part = 0, parts - 1 do
    redis.call('UNLINK', job .. ':done:' .. part, job .. ':sums:' .. part)
  end
  redis.call('HSET', job, 'spec', spec, 'parts', parts, 'created', now, 'committed', now, 'space', space, 'epoch', epoch,
    'done', 0, 'rows', 0, 'failed', 0, 'skipped', 0, 'truncated', 0, 'duplicates', 0, 'reused', 0,
    'tokens', 0, 'padded', 0)
end
redis.call('HSET', job, 'state', 'submitting', 'verdict', '', 'reason', '', 'max_errors', max_errors, 'pushed', now,
  'blocks', 0, 'sealed', 0, 'submitted', 0, 'added', 0, 'queued', 0, 'ended', '', 'manifest', '')
put('ZREM', recent, id)
redis.call('UNLINK', stream)
redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
put('ZADD', jobs, number(job, 'created'), id)
return {existing and 'REOPENED' or 'CREATED'}
