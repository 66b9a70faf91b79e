-- Record that a job's manifest stands, and all keys of the job get their expiry; or that it could not be written, and
-- when it may be tried again: 2 s later, then after twice as long each time.
--
-- KEYS the job's hash, finalize, shards, suspect, recent   (derived: <job>:done:<part>, <job>:sums:<part>)
-- ARGV job id, epoch, state, or 'finalizing' for a manifest that could not be written, ended (ms, as in the manifest),
--      time to live (ms; for 'finalizing': the longest pause before the next try), manifest or ''
-- Answers {OK} | {STALE} (leased again since, or reopened) | {UNKNOWN_JOB}
-- Twice: the second run finds the same epoch in an ended job and answers OK.

local job, finalize, shards, suspect, recent = unpack(KEYS)
local id, epoch, state, ended, ttl, manifest = unpack(ARGV)
ended, ttl = tonumber(ended), tonumber(ttl)

local current = redis.call('HGET', job, 'state')
if not current then return {'UNKNOWN_JOB'} end
if redis.call('HGET', job, 'epoch') ~= epoch then return {'STALE'} end
if current == state then
  if state == 'finalizing' then
    -- Twice as long after each try: what is damaged stays so until somebody mends it.
    local tries = math.min(number(job, 'tries') + 1, 30)
    redis.call('HSET', job, 'tries', tries)
    put('ZADD', finalize, 'XX', now_ms() + math.min(ttl, 1000 * 2 ^ tries), id)
  end
  return {'OK'}
end
if current ~= 'finalizing' then return {'STALE'} end

put('ZREM', finalize, id)
redis.call('HSET', job, 'state', state, 'ended', ended, 'manifest', manifest)
redis.call('HDEL', job, 'tries')
put('ZADD', recent, ended, id)
redis.call('ZREMRANGEBYSCORE', recent, '-inf', now_ms() - 30 * 86400000)
redis.call('PEXPIRE', recent, math.max(ttl, 30 * 86400000))
redis.call('PEXPIRE', shards, ttl)
redis.call('PEXPIRE', suspect, ttl)
for part = 0, parts_of(job) - 1 do
  redis.call('PEXPIRE', job .. ':done:' .. part, ttl)
  redis.call('PEXPIRE', job .. ':sums:' .. part, ttl)
end
-- The hash goes first: a job that is found has all its other keys.
redis.call('PEXPIRE', job, math.max(1, ttl - 1000))
return {'OK'}
