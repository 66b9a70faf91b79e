-- Hand entries back, claimable at once. A delivery that ended so is not counted: the count shows deaths only.
--
-- KEYS the stream
-- ARGV consumer, the consumer of released entries, how many of the deliveries are taken back: 1, or 0 if the consumer
--      died with the entries, then entry ids
-- Answers {OK}
-- Twice: the second run owns none of them and does nothing.

local FIRST = 4
local stream = unpack(KEYS)
local consumer, nobody, taken_back = unpack(ARGV, 1, FIRST - 1)

for i = FIRST, #ARGV do
  local pending = redis.pcall('XPENDING', stream, GROUP, ARGV[i], ARGV[i], 1)
  if not pending.err and #pending == 1 and pending[1][2] == consumer then
    -- Whoever claims an entry may say any count.
    local deaths = math.min(math.max(0, pending[1][4] - taken_back), 2147483647)
    redis.call('XCLAIM', stream, GROUP, nobody, 0, ARGV[i], 'IDLE', 86400000, 'RETRYCOUNT', deaths, 'JUSTID')
  end
end
return {'OK'}
