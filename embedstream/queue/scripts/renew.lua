-- Reset the idle time of entries that this consumer still owns. The delivery count stays (JUSTID).
--
-- KEYS 1 stream
-- ARGV 1 consumer, 2... entry ids
-- Answers the ids that the consumer no longer owns.
-- Twice: idle times are reset twice.

local stream, consumer = KEYS[1], ARGV[1]
local lost = {}
for i = 2, #ARGV do
  local pending = redis.pcall('XPENDING', stream, GROUP, ARGV[i], ARGV[i], 1)
  if pending.err or #pending == 0 or pending[1][2] ~= consumer then
    lost[#lost + 1] = ARGV[i]
  else
    redis.call('XCLAIM', stream, GROUP, consumer, 0, ARGV[i], 'JUSTID')
  end
end
return lost
