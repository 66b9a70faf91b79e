-- Remove a consumer that has nothing pending.
--
-- KEYS 1 stream
-- ARGV 1 consumer
-- Answers {OK} | {PENDING}
-- Twice: removing a consumer that is gone does nothing.

local pending = redis.pcall('XPENDING', KEYS[1], GROUP, '-', '+', 1, ARGV[1])
if pending.err then return {'OK'} end
if #pending > 0 then return {'PENDING'} end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, ARGV[1])
return {'OK'}
