-- Remove a consumer that has nothing pending.
--
-- KEYS the stream
-- ARGV consumer
-- Answers {OK} | {PENDING}
-- Twice: removing a consumer that is gone does nothing.

local stream = unpack(KEYS)
local consumer = unpack(ARGV)

local pending = redis.pcall('XPENDING', stream, GROUP, '-', '+', 1, consumer)
if pending.err then return {'OK'} end
if #pending > 0 then return {'PENDING'} end
redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer)
return {'OK'}
