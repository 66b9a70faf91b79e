-- Reset the idle time of entries that this consumer still owns. The delivery count stays (JUSTID).
--
-- KEYS the stream
-- ARGV consumer, then entry ids
-- Answers the ids that the consumer no longer owns.
-- Twice: idle times are reset twice.

local FIRST = 2
local stream = unpack(KEYS)
local consumer = unpack(ARGV, 1, FIRST - 1)

local lost = {}
for i = FIRST, #ARGV do
  local pending = redis.pcall('XPENDING', stream, GROUP, ARGV[i], ARGV[i], 1)
  if pending.err or #pending == 0 or pending[1][2] ~= consumer then
    lost[#lost + 1] = ARGV[i]
  else
    redis.call('XCLAIM', stream, GROUP, consumer, 0, ARGV[i], 'JUSTID')
  end
end
return lost
