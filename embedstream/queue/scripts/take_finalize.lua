-- Lease one job of the outbox. Each lease has its epoch; only the newest may say that it is finalized.
--
-- KEYS 1 job hash, 2 finalize
-- ARGV 1 job id, 2 lease (ms), 3 a name for this taking
-- Answers {TAKEN, epoch, now (ms), verdict} | {NONE} (not there, or leased)
-- Twice: the second run of the same taking answers the same lease; others may take the job after the lease.

local score = redis.call('ZSCORE', KEYS[2], ARGV[1])
local now = now_ms()
if not score then return {'NONE'} end
if tonumber(score) > now then
  local epoch, taking, verdict = unpack(redis.call('HMGET', KEYS[1], 'epoch', 'taking', 'verdict'))
  if taking == ARGV[3] then return {'TAKEN', epoch, now, verdict} end
  return {'NONE'}
end
if redis.call('HGET', KEYS[1], 'state') ~= 'finalizing' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return {'NONE'}
end
local wrong = no_counter(KEYS[1], 'epoch')
if wrong then return wrong end
let_through(KEYS[1])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[1], 'taking', ARGV[3])
return {'TAKEN', redis.call('HINCRBY', KEYS[1], 'epoch', 1), now, redis.call('HGET', KEYS[1], 'verdict')}
