-- What lies in blocks streams, without their bodies. Writes nothing.
--
-- KEYS streams of blocks
-- ARGV the consumer of released entries
-- Answers per stream {entries, entries in workers' hands, when its oldest entry was added (ms) or '0'}
-- Twice: a second look.

local nobody = unpack(ARGV)

local found = {}
for i, stream in ipairs(KEYS) do
  local first = redis.pcall('XRANGE', stream, '-', '+', 'COUNT', 1)
  local added = (not first.err and first[1]) and string.match(first[1][1], '^%d+') or '0'
  local entries = redis.pcall('XLEN', stream)
  found[i] = {type(entries) == 'number' and entries or 0, in_hands(stream, nobody), added}
end
return found
