-- Lease one job of the outbox. Each lease has its epoch; only the newest may say that it is finalized.
--
-- KEYS the job's hash, finalize
-- ARGV job id, lease (ms), a name for this taking
-- Answers {TAKEN, epoch, now (ms), verdict} | {NONE} (not there, or leased)
-- Twice: the second run of the same taking answers the same lease; others may take the job after the lease.

local job, finalize = unpack(KEYS)
local id, lease, name = unpack(ARGV)

local score = redis.call('ZSCORE', finalize, id)
local now = now_ms()
if not score then return {'NONE'} end
if tonumber(score) > now then
  local epoch, taking, verdict = unpack(redis.call('HMGET', job, 'epoch', 'taking', 'verdict'))
  if taking == name then return {'TAKEN', epoch, now, verdict} end
  return {'NONE'}
end
if redis.call('HGET', job, 'state') ~= 'finalizing' then
  redis.call('ZREM', finalize, id)
  return {'NONE'}
end
local wrong = no_counter(job, 'epoch')
if wrong then return wrong end
let_through(job)
redis.call('ZADD', finalize, now + tonumber(lease), id)
redis.call('HSET', job, 'taking', name)
redis.call('HDEL', job, 'closing') -- what is listed from now on is all that counts
return {'TAKEN', redis.call('HINCRBY', job, 'epoch', 1), now, redis.call('HGET', job, 'verdict')}
