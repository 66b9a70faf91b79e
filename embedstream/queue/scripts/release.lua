-- Hand entries back, claimable at once. A delivery that ended so is not counted: the count shows deaths only.
--
-- KEYS 1 stream
-- ARGV 1 consumer, 2 the consumer that stands for nobody, 3 how many of the deliveries are taken back: 1, or 0 if the
--      consumer died with the entries, 4... entry ids
-- Answers {OK}
-- Twice: the second run owns none of them and does nothing.

local stream, consumer, nobody = KEYS[1], ARGV[1], ARGV[2]
for i = 4, #ARGV do
  local pending = redis.pcall('XPENDING', stream, GROUP, ARGV[i], ARGV[i], 1)
  if not pending.err and #pending == 1 and pending[1][2] == consumer then
    -- Whoever claims an entry may say any count.
    local deaths = math.min(math.max(0, pending[1][4] - ARGV[3]), 2147483647)
    redis.call('XCLAIM', stream, GROUP, nobody, 0, ARGV[i], 'IDLE', 86400000, 'RETRYCOUNT', deaths, 'JUSTID')
  end
end
return {'OK'}
