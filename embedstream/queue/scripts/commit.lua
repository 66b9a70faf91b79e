-- Commit one durable shard of one job: clear its entries, set its blocks' done bits, count it, record it.
-- The last shard of a running job moves it into the outbox. Adopting a shard is the same without entries.
--
-- KEYS the job's hash, its stream of blocks, shards, jobs, bytes, finalize, suspect, pace
--      (derived: <job>:done:<part>, <job>:sums:<part>)
-- ARGV job id, shard name, shard record (JSON), space, ranges of its int8 columns (JSON), or '' if it has none, rows,
--      failed, skipped, truncated, duplicates, reused, tokens, padded, the spec that the shard was made by, or '', worker, how long it
--      worked for the shard (ms), 0 if that is not known, then groups of 5: part, block, sum (8 bytes), entry id or '', size
-- Answers {COMMITTED} | {ALREADY} (this shard is recorded) | {CONFLICT, part, block, ...} (blocks done by others:
--         their entries are cleared, nothing else is written) | {CHANGED, part, block, ...} (blocks whose content is
--         not the corpus's, or that it does not have: the shard is of no use) | {DROPPED, state} (or 'replaced', by a job of
--         another spec) | {OTHER_SPACE, space} | {OTHER_RANGES, ranges} (the first shard with ranges has those)
--         | {UNKNOWN_JOB}
-- Twice: the second run answers ALREADY; after CONFLICT, CONFLICT again.
-- An entry id from an earlier life of the job (reopened, or Redis emptied) names nothing: ids are times, lives follow
-- each other.

local FIRST = 17
local job, stream, shards, jobs, bytes, finalize, suspect, pace = unpack(KEYS)
local id, name, record, space, ranges, rows, failed, skipped, truncated, duplicates, reused, tokens, padded, spec, worker, worked
  = unpack(ARGV, 1, FIRST - 1)
worked = tonumber(worked)

local state = redis.call('HGET', job, 'state')
if not state then return {'UNKNOWN_JOB'} end
if redis.call('HEXISTS', shards, name) == 1 then return {'ALREADY'} end
local closing = is_closing(job, state)
if not is_open(state) and not closing then return {'DROPPED', state} end
if spec ~= '' and redis.call('HGET', job, 'spec') ~= spec then return {'DROPPED', 'replaced'} end

local pinned = redis.call('HGET', job, 'space')
if pinned ~= '' and pinned ~= space then return {'OTHER_SPACE', pinned} end
local calibrated = redis.call('HGET', job, 'ranges')
if ranges ~= '' and calibrated and calibrated ~= ranges then return {'OTHER_RANGES', calibrated} end

local conflict, changed, cleared, seen = {'CONFLICT'}, {'CHANGED'}, {}, {}
for i = FIRST, #ARGV, 5 do
  local part, block, sum = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  local wrong = impossible_block(job, part, block)
  if wrong then return wrong end
  local address = part .. ':' .. block
  if seen[address] then return redis.error_reply('ERR block ' .. address .. ' twice in shard ' .. name) end
  seen[address] = true
  if redis.call('GETBIT', job .. ':done:' .. part, block) == 1 then
    conflict[#conflict + 1] = part
    conflict[#conflict + 1] = block
    cleared[#cleared + 1] = i
  elseif block >= (tonumber(redis.call('HGET', job, 'sealed:' .. part)) or math.huge)
    or other_content(job, part, block, sum) then
    changed[#changed + 1] = part
    changed[#changed + 1] = block
  end
end
if #conflict > 1 then
  for _, i in ipairs(cleared) do
    if ARGV[i + 3] ~= '' then clear_entry(stream, job, bytes, ARGV[i + 3], ARGV[i + 4]) end
  end
  return conflict
end
if #changed > 1 then return changed end
-- Nothing below may fail in the middle: what it writes of the job's has been read above, or is here.
local wrong = no_counter(job, 'done', 'rows', 'failed', 'skipped', 'truncated', 'duplicates', 'reused', 'tokens', 'padded', 'queued', 'closing',
  'by:' .. worker)
if wrong then return wrong end
redis.call('XLEN', stream)

-- What a worker of this queue can do, over about the last ten minutes of work. It outlives workers and jobs: those who
-- start workers need it when there is none.
local function keep_pace()
  local size = 0
  for i = FIRST, #ARGV, 5 do size = size + ARGV[i + 4] end
  put('HINCRBY', pace, 'tokens', tokens)
  put('HINCRBY', pace, 'bytes', size)
  if put('HINCRBY', pace, 'ms', worked) > 600000 then
    for _, field in ipairs({'tokens', 'bytes', 'ms'}) do
      redis.call('HSET', pace, field, string.format('%.0f', math.floor(number(pace, field) / 2)))
    end
  end
  redis.call('PEXPIRE', pace, 30 * 86400000)
end

-- Freeing comes before taking, so that a full server drains.
for i = FIRST, #ARGV, 5 do
  if ARGV[i + 3] ~= '' then clear_entry(stream, job, bytes, ARGV[i + 3], ARGV[i + 4]) end
  put('HDEL', suspect, ARGV[i] .. ':' .. ARGV[i + 1])
end
for i = FIRST, #ARGV, 5 do
  redis.call('SETBIT', job .. ':done:' .. ARGV[i], ARGV[i + 1], 1)
  redis.call('SETRANGE', job .. ':sums:' .. ARGV[i], ARGV[i + 1] * 8, ARGV[i + 2])
end
redis.call('HSET', shards, name, record)
redis.call('HINCRBY', job, 'done', (#ARGV - FIRST + 1) / 5)
redis.call('HINCRBY', job, 'rows', rows)
redis.call('HINCRBY', job, 'failed', failed)
redis.call('HINCRBY', job, 'skipped', skipped)
redis.call('HINCRBY', job, 'truncated', truncated)
redis.call('HINCRBY', job, 'duplicates', duplicates)
redis.call('HINCRBY', job, 'reused', reused)
redis.call('HINCRBY', job, 'tokens', tokens)
redis.call('HINCRBY', job, 'padded', padded)
redis.call('HSET', job, 'space', space, 'committed', now_ms())
if ranges ~= '' then redis.call('HSET', job, 'ranges', ranges) end
if worker ~= '' then redis.call('HINCRBY', job, 'by:' .. worker, rows) end
if worked > 0 then keep_pace() end
if closing then
  local held = 0 -- of an adopted shard it stays 0, and -held would be -0, which is no integer
  for i = FIRST, #ARGV, 5 do
    if ARGV[i + 3] ~= '' then held = held + 1 end
  end
  if redis.call('HINCRBY', job, 'closing', 0 - held) <= 0 then put('ZADD', finalize, 'XX', 0, id) end
end
finish_if_done(job, id, stream, jobs, bytes, finalize)
return {'COMMITTED'}
