-- Acknowledge and delete claimed entries whose blocks are done already.
--
-- KEYS the job's hash, its stream of blocks, bytes   (derived: <job>:done:<part>)
-- ARGV groups of 4: part, block, entry id, size
-- Answers {OK}
-- Twice: the entries are gone, nothing is counted again. An entry whose block is not done stays.

local job, stream, bytes = unpack(KEYS)

for i = 1, #ARGV, 4 do
  if redis.call('GETBIT', job .. ':done:' .. ARGV[i], ARGV[i + 1]) == 1 then
    clear_entry(stream, job, bytes, ARGV[i + 2], ARGV[i + 3])
  end
end
return {'OK'}
