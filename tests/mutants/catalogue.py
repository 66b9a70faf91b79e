"""Ways to break the code, each with the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Edit:
    """A text that stands once in a file, and what stands there instead."""

    path: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Raises `ValueError` if the text is not there exactly once."""
        path = root / self.path
        text = path.read_text()
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.path} has {found} times, not once: {self.old!r}: adapt tests/mutants/catalogue.py")
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


SCRIPTS = "embedstream/queue/scripts"
COMMIT = "worker/embedstream_worker/commit.py"
ENGINES = "worker/embedstream_worker/engines"
AT_ONCE = "tests/engines/test_attention_at_once.py"
LANES = "tests/engines/test_lanes.py"
CONTRACT = "tests/broker/test_contract.py"
ENDINGS = "tests/broker/test_contract_endings.py"
FAULTS = "tests/e2e/test_worker_faults.py"
FOLDER = "tests/unit/test_dataset_folder.py"
INFER = "tests/unit/test_infer.py"
STAGES = "tests/broker/test_worker_stages.py"
SUBMISSION = "tests/unit/test_submission.py"
UNWRITABLE = "tests/e2e/test_unwritable_outputs.py"
WRITE = "worker/embedstream_worker/write.py"


def walk(name: str) -> str:
    return f"tests/crash/test_walk.py::test_each_row_comes_out_once_whoever_breaks[{name}]"


def mutant(name: str, path: str, old: str, new: str, *tests: str, also: tuple[Edit, ...] = ()) -> Mutant:
    return Mutant(name, (Edit(path, old, new), *also), tests)


MUTANTS = (
    mutant(
        "entries are acknowledged and not deleted",
        f"{SCRIPTS}/common.lua",
        "if redis.call('XDEL', stream, id) == 1 then unqueue(job, bytes, tonumber(size)) end",
        "unqueue(job, bytes, tonumber(size))",
        f"{CONTRACT}::test_commit_clears_entries_counts_rows_and_records_the_shard",
    ),
    mutant(
        "commit does not look at done bits",
        f"{SCRIPTS}/commit.lua",
        "if redis.call('GETBIT', job .. ':done:' .. part, block) == 1 then",
        "if false then",
        f"{CONTRACT}::test_late_commit_of_a_finished_block_is_refused_and_clears_only_that_entry",
    ),
    mutant(
        "a block is acknowledged before its shard is renamed",
        COMMIT,
        "            return shard.job.sink.write_shard(self._content(shard, outputs, rounded(outputs, data)))\n",
        (
            "            content = self._content(shard, outputs, rounded(outputs, data))\n"
            "            blocks = [block.commit for block in shard.blocks.values()]\n"
            "            self._broker.run(self._broker.commit(content.record, blocks, shard.job.stored))\n"
            "            return shard.job.sink.write_shard(content)\n"
        ),
        walk("worker-file.written#2=kill"),
    ),
    mutant(
        "a renewal counts as a delivery",
        f"{SCRIPTS}/renew.lua",
        ", ARGV[i], 'JUSTID')",
        ", ARGV[i])",
        f"{CONTRACT}::test_renew_names_the_entries_that_were_lost_and_keeps_the_delivery_count",
    ),
    mutant(
        "a renewal steals back what others took over",
        f"{SCRIPTS}/renew.lua",
        " or pending[1][2] ~= consumer",
        "",
        f"{CONTRACT}::test_renew_names_the_entries_that_were_lost_and_keeps_the_delivery_count",
    ),
    mutant(
        "a release counts as a death",
        f"{SCRIPTS}/release.lua",
        "math.max(0, pending[1][4] - taken_back)",
        "pending[1][4]",
        f"{CONTRACT}::test_released_entries_are_claimable_at_once_and_count_as_never_delivered",
    ),
    mutant(
        "a release gives away what others took over",
        f"{SCRIPTS}/release.lua",
        " and pending[1][2] == consumer",
        "",
        f"{CONTRACT}::test_released_entries_are_claimable_at_once_and_count_as_never_delivered",
    ),
    mutant(
        "a gap is taken for accepted",
        "embedstream/lifecycle/submission.py",
        "case Code.OK | Code.DUPLICATE:",
        "case Code.OK | Code.DUPLICATE | Code.GAP:",
        f"{SUBMISSION}::test_a_gap_sends_the_producer_back_to_the_block_that_redis_lost",
    ),
    mutant(
        "a full queue is taken for accepted",
        "embedstream/lifecycle/submission.py",
        "case Code.OK | Code.DUPLICATE:",
        "case Code.OK | Code.DUPLICATE | Code.FULL:",
        f"{SUBMISSION}::test_a_full_queue_is_waited_for_with_growing_pauses",
    ),
    mutant(
        "submit takes blocks above the next",
        f"{SCRIPTS}/submit.lua",
        "if block > next then return {'GAP', next} end\n",
        "",
        f"{CONTRACT}::test_submit_above_the_next_block_names_the_next",
    ),
    mutant(
        "submit takes a block again",
        f"{SCRIPTS}/submit.lua",
        "if block < next then return {'DUPLICATE'} end\n",
        "",
        walk("producer-submit.before#2=cut"),
    ),
    mutant(
        "submit does not bound the queue",
        f"{SCRIPTS}/submit.lua",
        "if queued > 0 and queued + size > bound then return {'FULL'} end\n",
        "",
        f"{CONTRACT}::test_submit_is_full_above_the_bound_but_never_for_a_block_alone",
    ),
    mutant(
        "submit and commit do not compare sums",
        f"{SCRIPTS}/common.lua",
        "return #known == 8 and known ~= string",
        "return false and known ~= string",
        f"{CONTRACT}::test_submit_of_other_content_under_a_known_number_is_changed",
        f"{CONTRACT}::test_adopting_what_the_corpus_no_longer_says_is_changed",
    ),
    mutant(
        "a part is sealed though blocks are missing",
        f"{SCRIPTS}/seal.lua",
        "if next < blocks then return {'MISSING', next} end\n",
        "",
        f"{CONTRACT}::test_sealing_finds_missing_blocks",
    ),
    mutant(
        "a shard that is recorded already is taken for a conflict",
        f"{SCRIPTS}/commit.lua",
        "if redis.call('HEXISTS', shards, name) == 1 then return {'ALREADY'} end\n",
        "",
        walk("worker-commit.before=cut"),
    ),
    mutant(
        "a commit whose reply was lost counts twice",
        f"{SCRIPTS}/commit.lua",
        "== 1 then return {'ALREADY'} end",
        "== 1 then redis.call('HINCRBY', job, 'rows', ARGV[5]) return {'ALREADY'} end",
        f"{CONTRACT}::test_commit_again_is_already_and_counts_nothing",
    ),
    mutant(
        "a conflict is taken for committed",
        COMMIT,
        "if answer.code not in (Code.CONFLICT, Code.CHANGED):",
        "if answer.code is not Code.CHANGED:",
        f"{FAULTS}::test_what_others_commit_first_is_left_out_of_the_shard",
        also=(
            Edit(
                COMMIT,
                "case Code.COMMITTED | Code.ALREADY:",
                "case Code.COMMITTED | Code.ALREADY | Code.CONFLICT:",
            ),
        ),
    ),
    mutant(
        "a shard that could not be written is forgotten",
        WRITE,
        "        closing.failures += 1\n",
        "        closing.failures += 1\n        closing.shards.clear()\n",
        f"{FAULTS}::test_an_output_that_cannot_be_written_for_a_while_is_waited_for",
    ),
    mutant(
        "a job that cannot be written is claimed on",
        "worker/embedstream_worker/jobs.py",
        " and job not in self._stuck]",
        "]",
        f"{UNWRITABLE}::test_no_more_of_a_job_is_claimed_while_it_cannot_be_written",
    ),
    mutant(
        "any number of jobs that cannot be written is held",
        WRITE,
        "        while self._too_much():\n",
        "        while False:\n",
        f"{UNWRITABLE}::test_of_many_jobs_that_cannot_be_written_no_more_is_held_than_may_wait",
    ),
    mutant(
        "refused rows are not counted",
        "worker/embedstream_worker/finish.py",
        "return BLOCK_BYTES + self.data.nbytes + self.errors.nbytes",
        "return BLOCK_BYTES + self.data.nbytes",
        "tests/unit/test_write.py::test_refused_rows_fill_a_shard_as_others_do",
    ),
    mutant(
        "blocks without a row are not counted",
        "worker/embedstream_worker/finish.py",
        "return BLOCK_BYTES + self.data.nbytes",
        "return self.data.nbytes",
        "tests/unit/test_write.py::test_blocks_without_a_row_fill_a_shard_too",
    ),
    mutant(
        "finished rows lie in the bytes of their block",
        "worker/embedstream_worker/finish.py",
        "_copied(rows.column(field.name))",
        "rows.column(field.name)",
        "tests/unit/test_write.py::test_a_finished_block_keeps_nothing_of_the_bytes_that_it_was_read_from",
    ),
    mutant(
        "commit takes vectors of another space",
        f"{SCRIPTS}/commit.lua",
        "if pinned ~= '' and pinned ~= space then",
        "if false then",
        f"{CONTRACT}::test_commit_of_another_space_is_refused",
    ),
    mutant(
        "commit takes int8 columns of other ranges",
        f"{SCRIPTS}/commit.lua",
        "if ranges ~= '' and calibrated and calibrated ~= ranges then",
        "if false then",
        f"{CONTRACT}::test_int8_columns_have_the_ranges_of_the_first_that_says_them",
    ),
    mutant(
        "commit counts for a job that has ended",
        f"{SCRIPTS}/commit.lua",
        "if not is_open(state) and not closing then return {'DROPPED', state} end\n",
        "",
        f"{CONTRACT}::test_commit_to_an_ended_job_is_dropped",
    ),
    mutant(
        "commit counts for a cancelled job whose manifest is being written",
        f"{SCRIPTS}/take_finalize.lua",
        "redis.call('HDEL', job, 'closing')",
        "",
        f"{CONTRACT}::test_what_is_in_hand_of_a_cancelled_job_counts_until_its_manifest_is_written",
    ),
    mutant(
        "adopted blocks get no done bits",
        f"{SCRIPTS}/commit.lua",
        "  redis.call('SETBIT', job .. ':done:' .. ARGV[i], ARGV[i + 1], 1)\n",
        ("  if ARGV[i + 3] ~= '' then redis.call('SETBIT', job .. ':done:' .. ARGV[i], ARGV[i + 1], 1) end\n"),
        f"{CONTRACT}::test_a_block_that_is_done_already_is_counted_but_not_queued",
        f"{CONTRACT}::test_adopted_blocks_are_dropped_by_those_who_claim_them_later",
    ),
    mutant(
        "claimed blocks that are done are worked on again",
        "embedstream/queue/broker.py",
        "if address is not None and next(done):",
        "if address is not None and not next(done) < 2:",
        f"{CONTRACT}::test_adopted_blocks_are_dropped_by_those_who_claim_them_later",
    ),
    mutant(
        "blocks whose claim was never answered are forgotten",
        "worker/embedstream_worker/intake.py",
        "self._unseen = True\n",
        "self._unseen = False\n",
        f"{FAULTS}::test_blocks_whose_claim_was_never_answered_are_handed_back_at_once",
    ),
    mutant(
        "any finalizer may say that a job is finalized",
        f"{SCRIPTS}/finalized.lua",
        "if redis.call('HGET', job, 'epoch') ~= epoch then return {'STALE'} end\n",
        "",
        f"{ENDINGS}::test_only_the_newest_lease_may_say_that_a_job_is_finalized",
    ),
    mutant(
        "a job is leased to two finalizers",
        f"{SCRIPTS}/take_finalize.lua",
        "if taking == name then",
        "if taking then",
        f"{ENDINGS}::test_a_job_of_the_outbox_is_leased_to_one",
    ),
    mutant(
        "a finalizer whose lease was not answered waits for itself",
        f"{SCRIPTS}/take_finalize.lua",
        "if taking == name then",
        "if false then",
        f"{ENDINGS}::test_a_finalizer_whose_lease_was_never_answered_gets_it_by_asking_again",
    ),
    mutant(
        "keys of an ended job stay forever",
        f"{SCRIPTS}/finalized.lua",
        "redis.call('PEXPIRE', shards, ttl)\n",
        "",
        f"{ENDINGS}::test_finalized_ends_the_job_and_all_its_keys_expire",
    ),
    mutant(
        "the manifest is written before the errors",
        "embedstream/dataset/folder.py",
        "        if manifest.failed or ERRORS in self.files.names():\n",
        (
            "        self.files.write(MANIFEST, manifest_pieces(manifest))\n"
            "        if manifest.failed or ERRORS in self.files.names():\n"
        ),
        f"{FOLDER}::test_each_file_is_on_disk_before_the_next_step",
        walk("finalizer-file.renamed=kill"),
    ),
    mutant(
        "a manifest lists a block twice",
        "embedstream/dataset/shard_sums.py",
        "if part.seen[block.block]:",
        "if False:",
        "tests/unit/test_dataset_manifest.py::test_a_block_in_two_shards_is_refused",
    ),
    mutant(
        "a file is written in its place",
        "embedstream/dataset/files.py",
        'temporary = f".{path.name}{TEMPORARY}{uuid.uuid4().hex}"',
        "temporary = path.name",
        f"{FOLDER}::test_a_kill_before_the_rename_leaves_nothing_that_counts",
        also=(Edit("embedstream/dataset/files.py", "os.O_CREAT | os.O_EXCL", "os.O_CREAT | os.O_TRUNC"),),
    ),
    mutant(
        "a file is renamed before it is on disk",
        "embedstream/dataset/files.py",
        "            os.fsync(file.fileno())\n",
        "",
        f"{FOLDER}::test_each_file_is_on_disk_before_the_next_step",
    ),
    mutant(
        "half-written files of dead writers stay",
        "embedstream/dataset/folder.py",
        "                self.files.remove(sorted(left))\n",
        "                pass\n",
        walk("worker-file.written=kill"),
    ),
    mutant(
        "errors of a shard that nobody committed count in Redis",
        "embedstream/dataset/redis_hashes.py",
        "            if shard in shards:\n",
        "            if shard:\n",
        "tests/unit/test_dataset_hashes.py::test_a_late_worker_that_fails_a_row_with_a_vector_leaves_no_error",
    ),
    mutant(
        "an id takes the key of a dataset's own errors in Redis",
        "embedstream/dataset/redis_hashes.py",
        'return f"_{id}" if id.startswith("_") else id',
        'return f"{id}:0" if id in ("_errors", "_manifest", "_pending") else id',
        "tests/unit/test_dataset_hashes.py::test_no_id_takes_the_key_of_another_or_of_the_sink_itself",
    ),
    mutant(
        "an id is taken twice",
        "embedstream/corpus/cutting.py",
        "elif (position := next(earlier)) is not None:",
        "elif (position := next(earlier)) is not None and position.row < 0:",
        "tests/unit/test_corpus.py::test_an_id_of_an_earlier_part_is_a_duplicate",
    ),
    mutant(
        "NaN passes for a vector",
        "worker/embedstream_worker/work.py",
        "finite = ~bad[Fault.NOT_FINITE]",
        "finite = np.ones(len(rows), np.bool_)",
        f"{INFER}::test_a_vector_that_is_not_finite_in_float32_either_is_an_error_and_its_neighbours_are_not",
    ),
    mutant(
        "vectors stay in the order of their lengths",
        "worker/embedstream_worker/work.py",
        "place.put(rows, results[kind])",
        "place.put(np.sort(rows), results[kind])",
        f"{INFER}::test_vectors_return_to_their_rows",
    ),
    mutant(
        "the prompt is left out of the input hash",
        "worker/embedstream_worker/tokenize.py",
        "hashes = input_hashes(entered(rows, query), job.prompt)\n        "
        "known = None if job.known is None else job.known.find(hashes)\n        first",
        "hashes = input_hashes(entered(rows, query))\n        "
        "known = None if job.known is None else job.known.find(hashes)\n        first",
        f"{FAULTS}::test_vector_and_hash_are_of_the_prompt_and_the_text",
    ),
    mutant(
        "leases are not renewed",
        "worker/embedstream_worker/lease.py",
        "some = entries[start : start + ENTRIES_PER_STEP]",
        "some = []",
        "tests/broker/test_worker_stages.py::test_every_held_entry_is_renewed_however_many_there_are",
    ),
    mutant(
        "a worker takes over leases that run",
        "embedstream/queue/broker.py",
        "xautoclaim(stream, GROUP, consumer, idle_ms,",
        "xautoclaim(stream, GROUP, consumer, 0,",
        "tests/broker/test_claims.py::test_a_sweep_takes_expired_leases_only_and_counts_deaths",
    ),
    mutant(
        "leases are renewed though nothing moves",
        "worker/embedstream_worker/lease.py",
        "        if stalled:\n",
        "        if False:\n",
        "tests/broker/test_worker_stages.py::test_a_pipeline_that_gets_nowhere_gives_its_leases_up",
    ),
    mutant(
        "a chunk that may kill is not noted before it is tried",
        "worker/embedstream_worker/suspects.py",
        "chunks = self._guilty if row is None else (*self._guilty, row)",
        "chunks = self._guilty",
        walk("suspicious-suspect.after=kill"),
    ),
    mutant(
        "blocks that killed are never tried chunk by chunk",
        "worker/embedstream_worker/tokenize.py",
        "blocks[0].deliveries >= BY_CHUNK",
        "blocks[0].deliveries >= BY_CHUNK * 100",
        walk("suspicious-suspect.before=kill"),
    ),
    mutant(
        "links lead out of an output root",
        "embedstream/dataset/roots.py",
        "above, below = os.path.realpath(root), os.path.realpath(output)",
        "above, below = os.path.abspath(root), os.path.abspath(output)",
        "tests/unit/test_roots.py::test_dots_and_links_do_not_lead_out_of_a_root",
    ),
    mutant(
        "a folder beside an output root is taken for one below it",
        "embedstream/dataset/roots.py",
        "below.startswith(above.rstrip(os.sep) + os.sep)",
        "below.startswith(above)",
        "tests/unit/test_roots.py::test_a_sibling_whose_name_begins_like_the_root_is_outside",
    ),
    mutant(
        "a block may hold anything once decompressed",
        "embedstream/queue/ipc_bounds.py",
        "if content > most_bytes:",
        "if False:",
        "tests/unit/test_block_bounds.py::test_a_block_that_states_more_than_it_may_hold_is_refused_unread",
    ),
    mutant(
        "a worker takes all that is left although others are there",
        "worker/embedstream_worker/intake.py",
        "return max(1, share)",
        "return math.inf",
        f"{STAGES}::test_at_the_end_of_a_job_windows_leave_something_for_the_other_workers",
    ),
    mutant(
        "a worker claims windows long before it needs them",
        "worker/embedstream_worker/ahead.py",
        "return tokens > self.tokens_per_second * LEAD_SECONDS",
        "return False",
        f"{STAGES}::test_the_next_window_is_not_claimed_while_enough_is_on_the_way",
    ),
    mutant(
        "a block is forgotten when Redis fails between its claim and its window",
        "worker/embedstream_worker/intake.py",
        """            blocks += decoded
            for held in decoded:""",
        """            if decoded and not alone:
                self._share(jobs, full)
            blocks += decoded
            for held in decoded:""",
        f"{STAGES}::test_what_is_claimed_is_in_a_window_though_redis_cannot_say_how_much_is_left",
    ),
    mutant(
        "attention of packed texts sees one token more than the window",
        f"{ENGINES}/packed_attention.py",
        "scale=scaling, window_size=window, **options",
        "scale=scaling, window_size=(window[0] + 1, window[1]), **options",
        f"{AT_ONCE}::test_attention_that_is_right_passes_the_check",
    ),
    mutant(
        "attention that is a little wrong passes the check at load",
        f"{ENGINES}/attention_check.py",
        "if not error <= MOST_ERROR:",
        "if not error <= 1:",
        f"{AT_ONCE}::test_attention_that_is_a_little_wrong_fails_the_check",
    ),
    mutant(
        "each packed batch waits for the device",
        f"{ENGINES}/torch_features.py",
        "longest = bound(batch.longest)",
        "longest = bound(int((starts[1:] - starts[:-1]).max()))",
        f"{AT_ONCE}::test_a_packed_batch_waits_for_nothing",
    ),
    mutant(
        "a batch computes before its ids are on the device",
        f"{ENGINES}/lanes.py",
        "                self._computing.wait_event(lane.sent)\n",
        "",
        f"{LANES}::test_in_whatever_order_streams_get_on_each_batch_gets_its_own_vectors",
    ),
    mutant(
        "vectors are fetched before they are computed",
        f"{ENGINES}/lanes.py",
        "            self._fetching.wait_event(self.computed)\n",
        "",
        f"{LANES}::test_in_whatever_order_streams_get_on_each_batch_gets_its_own_vectors",
    ),
    mutant(
        "results are remembered for another job's space",
        "worker/embedstream_worker/equal_texts.py",
        "self._maker: Maker = group.job.space, frozenset(outputs)",
        'self._maker: Maker = "", frozenset(outputs)',
        "tests/unit/test_equal_texts.py::test_nothing_is_taken_from_results_that_were_made_in_another_way",
    ),
    mutant(
        "a text that failed is remembered",
        "worker/embedstream_worker/equal_texts.py",
        "            good[[int(text[row]) for row in errors]] = False\n",
        "",
        "tests/unit/test_equal_texts.py::test_a_text_that_fails_fails_in_all_its_rows_and_is_tried_again_in_the_next_window",
    ),
    mutant(
        "rows behind a bad row of a CSV have its number",
        "producer/embedstream_producer/tables.py",
        "                row += 1\n                continue",
        "                continue",
        "tests/unit/test_corpus_formats.py::test_a_row_of_a_csv_with_another_number_of_values_costs_only_itself",
    ),
    mutant(
        "no chunk is proved to fit",
        "worker/embedstream_worker/cutting.py",
        "            if not long:",
        "            if True:",
        "tests/engines/test_chunk_tokens.py::test_every_chunk_fits_and_nothing_is_left_out",
    ),
    mutant(
        "a chunk may share more than the overlap",
        "worker/embedstream_worker/splitting.py",
        "earliest = int(np.searchsorted(tokens, stop)) - overlap",
        "earliest = int(np.searchsorted(tokens, stop)) - overlap - 2",
        "tests/unit/test_splitting.py::test_a_chunk_begins_with_sentences_of_the_one_before",
    ),
)
