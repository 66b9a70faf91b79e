-- Prepended to every script. Time is the server's own; no other clock is ever asked.

local GROUP = 'workers'

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A counter of a hash; 0 for what is none. Lua reads nan, inf, 0x10 and 1e300, too, with which a loop would never end.
local function number(key, field)
  local value = redis.pcall('HGET', key, field)
  local n = type(value) == 'string' and tonumber(value) or 0
  return (n == math.floor(n) and math.abs(n) <= 9007199254740992) and n or 0
end

-- How many parts a job has: its spec names each of them, whatever its counter says.
local function parts_of(job)
  return math.min(number(job, 'parts'), #(redis.call('HGET', job, 'spec') or ''))
end

-- An error, to be answered before anything is written, if one of these counters of a job is none; nil if all are.
local function no_counter(job, ...)
  for i, value in ipairs(redis.call('HMGET', job, ...)) do
    if value and (#value > 16 or not (value == '0' or string.match(value, '^-?[1-9]%d*$'))) then
      return redis.error_reply('ERR hash value is not an integer: ' .. select(i, ...) .. ' of ' .. job)
    end
  end
end

-- Write to a key of the queue. What lies there and is of another type, or no number, is nothing of the queue's: it gives
-- way, so that no job waits for it.
local function put(command, key, ...)
  local answer = redis.pcall(command, key, ...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  for _, words in ipairs({'WRONGTYPE', 'not an integer', 'would overflow'}) do
    if string.find(answer.err, words, 1, true) then redis.call('UNLINK', key) end
  end
  return redis.call(command, key, ...)
end

-- A server without memory refuses the first write of a script, and no later one, if that write could take memory.
-- A write that takes none comes before the few bytes of steps that help such a server to drain.
local function let_through(job)
  redis.call('PERSIST', job)
end

-- Why a job cannot have this block (to be answered as an error), or nil. The sums of a part, 8 bytes a block, end at
-- 512 MiB.
local function impossible_block(job, part, block)
  local n, parts = tonumber(part), number(job, 'parts')
  if not n or n < 0 or n >= parts or n ~= math.floor(n) then
    return redis.error_reply('ERR part ' .. part .. ' of a job with ' .. parts .. ' parts')
  end
  if not block or block < 0 or block >= 67108864 or block ~= math.floor(block) then
    return redis.error_reply('ERR block number out of bounds in part ' .. part)
  end
end

-- Whether another content is known under this block's number.
local function other_content(job, part, block, sum)
  local known = redis.call('GETRANGE', job .. ':sums:' .. part, block * 8, block * 8 + 7)
  return #known == 8 and known ~= string.rep('\0', 8) and known ~= sum
end

-- Take `size` queued bytes off the queue's counter.
local function take_off(bytes, size)
  if size ~= 0 and put('DECRBY', bytes, size) <= 0 then redis.call('DEL', bytes) end
end

-- Take them off the job's, too.
local function unqueue(job, bytes, size)
  if size ~= 0 then redis.call('HINCRBY', job, 'queued', -size) end
  take_off(bytes, size)
end

-- Acknowledge and delete one entry; its bytes are counted off only if it was still there.
local function clear_entry(stream, job, bytes, id, size)
  redis.call('XACK', stream, GROUP, id)
  if redis.call('XDEL', stream, id) == 1 then unqueue(job, bytes, tonumber(size)) end
end

-- How many entries of a stream are in workers' hands. `nobody`: the consumer of those that were handed back.
local function in_hands(stream, nobody)
  local pending, held = redis.pcall('XPENDING', stream, GROUP), 0
  if not pending.err then
    for _, owner in ipairs(pending[4] or {}) do
      if owner[1] ~= nobody then held = held + owner[2] end
    end
  end
  return held
end

-- Drop what is queued as a whole (entry by entry would stop the server) and put the job into the outbox.
local function to_outbox(job, id, stream, jobs, bytes, finalize, verdict)
  redis.call('UNLINK', stream)
  take_off(bytes, number(job, 'queued'))
  put('ZREM', jobs, id)
  redis.call('HSET', job, 'state', 'finalizing', 'verdict', verdict, 'queued', 0)
  put('ZADD', finalize, 0, id)
end

-- A running job whose blocks are all done moves on.
local function finish_if_done(job, id, stream, jobs, bytes, finalize)
  if redis.call('HGET', job, 'state') == 'running' and number(job, 'done') >= number(job, 'blocks') then
    to_outbox(job, id, stream, jobs, bytes, finalize, '')
  end
end

local function is_open(state)
  return state == 'submitting' or state == 'running'
end

-- Whether it was cancelled a moment ago, and workers may still commit what they hold.
local function is_closing(job, state)
  return state == 'finalizing' and number(job, 'closing') > 0
end
