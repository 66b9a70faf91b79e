-- Prepended to every script. Time is the server's own; no other clock is ever asked.

local GROUP = 'workers'

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function number(key, field)
  return tonumber(redis.call('HGET', key, field) or '0') or 0
end

-- A server without memory refuses the first write of a script, and no later one, if that write could take memory.
-- A write that takes none comes before the few bytes of steps that help such a server to drain.
local function let_through(job)
  redis.call('PERSIST', job)
end

-- Why a job cannot have this block (to be answered as an error), or nil. The sums of a part, 8 bytes a block, end at
-- 512 MiB.
local function impossible_block(job, part, block)
  local n = tonumber(part)
  if not n or n < 0 or n >= number(job, 'parts') or n ~= math.floor(n) then
    return redis.error_reply('ERR part ' .. part .. ' of a job with ' .. number(job, 'parts') .. ' parts')
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

-- Take `size` queued bytes off the job's and the queue's counters.
local function unqueue(job, bytes, size)
  if size == 0 then return end
  redis.call('HINCRBY', job, 'queued', -size)
  if redis.call('DECRBY', bytes, size) <= 0 then redis.call('DEL', bytes) end
end

-- Acknowledge and delete one entry; its bytes are counted off only if it was still there.
local function clear_entry(stream, job, bytes, id, size)
  redis.call('XACK', stream, GROUP, id)
  if redis.call('XDEL', stream, id) == 1 then unqueue(job, bytes, tonumber(size)) end
end

-- Drop what is queued as a whole (entry by entry would stop the server) and put the job into the outbox.
local function to_outbox(job, id, stream, jobs, bytes, finalize, verdict)
  redis.call('UNLINK', stream)
  unqueue(job, bytes, number(job, 'queued'))
  redis.call('ZREM', jobs, id)
  redis.call('HSET', job, 'state', 'finalizing', 'verdict', verdict)
  redis.call('ZADD', finalize, 0, id)
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
