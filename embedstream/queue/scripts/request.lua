-- Put one interactive request on its stream.
--
-- KEYS 1 interactive stream, 2 caller
-- ARGV 1 how long the caller waits (ms), 2 most requests that may wait, 3... entry fields
-- Answers {OK} | {BUSY}
-- Twice: two entries with one caller; the first reply answers, the second finds the caller gone.

local waiting = put('XLEN', KEYS[1])
redis.pcall('XGROUP', 'CREATE', KEYS[1], GROUP, '0', 'MKSTREAM')
redis.call('PEXPIRE', KEYS[1], 86400000)
if waiting >= tonumber(ARGV[2]) then return {'BUSY'} end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[1])
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
return {'OK'}
