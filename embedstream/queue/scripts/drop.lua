-- Acknowledge and delete claimed entries whose blocks are done already.
--
-- KEYS 1 job hash, 2 blocks stream, 3 bytes   (derived: <job>:done:<part>)
-- ARGV groups of 4: part, block, entry id, size
-- Answers {OK}
-- Twice: the entries are gone, nothing is counted again. An entry whose block is not done stays.

for i = 1, #ARGV, 4 do
  if redis.call('GETBIT', KEYS[1] .. ':done:' .. ARGV[i], ARGV[i + 1]) == 1 then
    clear_entry(KEYS[2], KEYS[1], KEYS[3], ARGV[i + 2], ARGV[i + 3])
  end
end
return {'OK'}
