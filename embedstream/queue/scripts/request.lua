-- Put one interactive request on its stream.
--
-- KEYS the interactive stream, caller
-- ARGV how long the caller waits (ms), most requests that may wait, then the entry's fields
-- Answers {OK} | {BUSY}
-- Twice: two entries with one caller; the first reply answers, the second finds the caller gone.

local FIRST = 3
local interactive, caller = unpack(KEYS)
local patience, most = unpack(ARGV, 1, FIRST - 1)

local waiting = put('XLEN', interactive)
redis.pcall('XGROUP', 'CREATE', interactive, GROUP, '0', 'MKSTREAM')
redis.call('PEXPIRE', interactive, 86400000)
if waiting >= tonumber(most) then return {'BUSY'} end
redis.call('SET', caller, '1', 'PX', patience)
redis.call('XADD', interactive, '*', unpack(ARGV, FIRST))
return {'OK'}
