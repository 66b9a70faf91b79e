-- Prepended to every script. Time is the server's own; no other clock is ever asked.

local GROUP = 'workers'

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function number(key, field)
  return tonumber(redis.call('HGET', key, field) or '0') or 0
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
