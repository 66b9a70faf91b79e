-- Answer an interactive request if its caller is still there.
--
-- KEYS 1 interactive stream, 2 caller, 3 reply list
-- ARGV 1 entry id, 2 payload, 3 how long the reply may wait to be read (ms)
-- Answers {OK} | {GONE}
-- Twice: the entry is gone, so the second run answers GONE and pushes nothing.

redis.call('XACK', KEYS[1], GROUP, ARGV[1])
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 or redis.call('DEL', KEYS[2]) == 0 then return {'GONE'} end
put('RPUSH', KEYS[3], ARGV[2])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
return {'OK'}
