-- Answer an interactive request if its caller is still there.
--
-- KEYS the interactive stream, caller, the list for the reply
-- ARGV entry id, payload, how long the reply may wait to be read (ms)
-- Answers {OK} | {GONE}
-- Twice: the entry is gone, so the second run answers GONE and pushes nothing.

local interactive, caller, reply = unpack(KEYS)
local entry, payload, keep = unpack(ARGV)

redis.call('XACK', interactive, GROUP, entry)
if redis.call('XDEL', interactive, entry) == 0 or redis.call('DEL', caller) == 0 then return {'GONE'} end
put('RPUSH', reply, payload)
redis.call('PEXPIRE', reply, keep)
return {'OK'}
