"""Every step and every answer of the steps table, on a real server and on fakeredis."""

from __future__ import annotations

import msgspec
import pytest
import redis
from lab.broker import HOUR_MS, Lab, in_int8, make_entry, make_record, to_commit

from embedstream.errors import BrokerError, JobUnknown
from embedstream.jobs import JobState, decode_spec
from embedstream.keys import RELEASED
from embedstream.outputs import encode_ranges
from embedstream.queue.steps import MOST_BLOCKS, Answer, Code, CommitBlock, Step
from embedstream.records import PartContent

# create


def test_create_makes_a_job_that_is_submitting_with_all_counters_at_zero(lab: Lab) -> None:
    spec = lab.spec(parts=2)
    assert lab.broker.run(lab.broker.create(spec, "5%")) == Answer(Code.CREATED)
    status = lab.broker.status(spec.job)
    assert (status.state, status.spec, status.max_errors) == (JobState.SUBMITTING, spec, "5%")
    assert (status.rows, status.failed, status.blocks, status.done, status.queued_bytes) == (0, 0, 0, 0, 0)
    assert (status.sealed, status.space, status.ended, status.stalled) == (False, "", None, False)
    assert lab.broker.active_jobs() == [spec.job]


def test_create_again_finds_the_job_and_takes_the_new_bound_on_errors(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    answer = lab.broker.run(lab.broker.create(lab.spec(), "7"))
    assert (answer.code, answer.state) == (Code.EXISTS, JobState.SUBMITTING)
    assert (lab.broker.status(job).max_errors, lab.broker.backlog(job)) == ("7", 2)


def test_create_refuses_another_spec_for_the_same_output_and_shows_the_existing_one(lab: Lab) -> None:
    lab.create()
    answer = lab.broker.run(lab.broker.create(lab.spec(model="other")))
    assert answer.code is Code.DIFFERS
    assert decode_spec(answer.detail) == lab.spec()


@pytest.mark.parametrize("verdict", [JobState.CANCELLED, JobState.FAILED])
def test_a_job_that_ended_without_a_row_gives_way_to_another_spec(lab: Lab, verdict: JobState) -> None:
    job = lab.create(parts=2)
    lab.fill(job, 3, part=1)
    lab.commit_blocks(job, [CommitBlock(1, 0, make_entry(1, 0).sum)], rows=0)
    lab.broker.run(lab.broker.cancel(job, verdict))
    wanted = lab.spec(model="other")
    assert lab.broker.run(lab.broker.create(wanted)).code is Code.DIFFERS  # not before its end
    lab.finalize(job, verdict)
    assert lab.broker.run(lab.broker.create(wanted)) == Answer(Code.CREATED)
    status = lab.broker.status(job)
    assert (status.state, status.spec, status.done, status.failed) == (JobState.SUBMITTING, wanted, 0, 0)
    assert (lab.broker.active_jobs(), lab.broker.recent_jobs(), lab.left_behind()) == ([job], [], [])
    lab.fill(job, 1)
    lab.seal(job, 0, 1)
    assert lab.commit(job, lab.claim(job)).code is Code.COMMITTED


def test_a_job_that_ended_early_with_rows_holds_its_output(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    lab.commit(job, lab.claim(job)[:1])
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    assert lab.broker.run(lab.broker.create(lab.spec(model="other"))).code is Code.DIFFERS


def test_what_was_computed_for_a_replaced_job_is_dropped(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    (late,) = lab.claim(job)
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    wanted = lab.spec(model="other")
    lab.broker.run(lab.broker.create(wanted))
    lab.fill(job, 1)
    record = make_record(job, "late", [(0, 0)], "old")
    step = lab.broker.commit(record, [to_commit(late)], lab.spec().encode())
    assert lab.broker.run(step) == Answer(Code.DROPPED, detail="replaced")
    assert lab.broker.status(job).done == 0
    step = lab.broker.commit(record, [to_commit(c) for c in lab.claim(job)], wanted.encode())
    assert lab.broker.run(step) == Answer(Code.COMMITTED)


def test_a_completed_job_is_found_and_not_reopened(lab: Lab) -> None:
    job = lab.sealed_job(1)
    lab.commit(job, lab.claim(job))
    lab.finalize(job)
    answer = lab.broker.run(lab.broker.create(lab.spec()))
    assert (answer.code, answer.state) == (Code.EXISTS, JobState.COMPLETED)


@pytest.mark.parametrize("verdict", [JobState.CANCELLED, JobState.FAILED])
def test_an_ended_early_job_is_reopened_and_keeps_what_is_done(lab: Lab, verdict: JobState) -> None:
    job = lab.create()
    lab.fill(job, 3)
    lab.commit(job, lab.claim(job)[:1])
    lab.broker.run(lab.broker.suspect(job, 0, 1, (17,)))
    lab.broker.run(lab.broker.cancel(job, verdict))
    lab.finalize(job, verdict)
    assert lab.broker.run(lab.broker.create(lab.spec())) == Answer(Code.REOPENED)
    status = lab.broker.status(job)
    assert (status.state, status.done, status.rows, status.blocks) == (JobState.SUBMITTING, 1, 9, 0)
    assert (lab.broker.active_jobs(), lab.broker.recent_jobs()) == ([job], [])
    assert lab.broker.suspected(job, 0, 1) == ()  # its new entry has killed nobody
    assert all(lab.client.pttl(key) == -1 for key in (lab.keys.job(job), lab.keys.shards(job), lab.keys.done(job, 0)))
    lab.fill(job, 3)
    assert lab.broker.backlog(job) == 2  # block 0 is done
    lab.seal(job, 0, 3)
    assert lab.commit(job, lab.claim(job)).code is Code.COMMITTED
    lab.finalize(job)
    assert lab.broker.status(job).rows == 27


# submit


def test_submit_adds_the_next_block_and_counts_it(lab: Lab) -> None:
    job = lab.create()
    assert lab.submit(job, 0, 0, size=100) == Answer(Code.OK)
    assert lab.submit(job, 0, 1, size=50) == Answer(Code.OK)
    status = lab.broker.status(job)
    assert (status.blocks, status.submitted, status.queued_bytes, lab.queued_bytes()) == (2, 20, 150, 150)
    assert [(c.fields[b"block"], c.fields[b"body"]) for c in lab.claim(job)] == [(b"0", b"x" * 100), (b"1", b"x" * 50)]


def test_submit_again_is_a_duplicate_and_writes_nothing(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    assert lab.submit(job, 0, 0) == Answer(Code.DUPLICATE)
    assert (lab.broker.backlog(job), lab.queued_bytes(), lab.broker.next_block(job, 0)) == (1, 100, 1)


def test_submit_above_the_next_block_names_the_next(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    assert lab.submit(job, 0, 3) == Answer(Code.GAP, number=1)


def test_submit_of_other_content_under_a_known_number_is_changed(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    answer = lab.submit(job, 0, 1, variant=1)
    assert (answer.code, answer.number) == (Code.CHANGED, 1)
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    assert lab.submit(job, 0, 0, variant=1).code is Code.CHANGED  # a reopened job has the same corpus


def test_submit_to_a_sealed_part_is_changed(lab: Lab) -> None:
    job = lab.create(parts=2)
    lab.fill(job, 1)
    lab.seal(job, 0, 1)
    assert lab.submit(job, 0, 1).code is Code.CHANGED
    assert lab.submit(job, 0, 0).code is Code.DUPLICATE
    assert lab.submit(job, 1, 0).code is Code.OK


def test_submit_is_full_above_the_bound_but_never_for_a_block_alone(lab: Lab) -> None:
    job = lab.create()
    assert lab.submit(job, 0, 0, size=500, bound=100).code is Code.OK
    assert lab.submit(job, 0, 1, size=1, bound=100) == Answer(Code.FULL)
    assert lab.commit(job, lab.claim(job)).code is Code.COMMITTED
    assert lab.submit(job, 0, 1, size=1, bound=100).code is Code.OK


def test_submit_is_full_above_a_jobs_share_when_two_jobs_push(lab: Lab) -> None:
    large, small = lab.create("/large"), lab.create("/small")
    assert lab.submit(large, 0, 0, size=400, bound=1000).code is Code.OK
    assert lab.submit(large, 0, 1, size=101, bound=1000).code is Code.FULL
    assert lab.submit(small, 0, 0, size=500, bound=1000).code is Code.OK
    lab.broker.run(lab.broker.cancel(small))
    assert lab.submit(large, 0, 1, size=101, bound=1000).code is Code.OK


def test_a_block_that_is_done_already_is_counted_but_not_queued(lab: Lab) -> None:
    job = lab.create()
    lab.adopt(job, [(0, 0)])
    assert lab.submit(job, 0, 0, bound=1).code is Code.OK
    assert (lab.broker.backlog(job), lab.queued_bytes(), lab.broker.status(job).submitted) == (0, 0, 10)


def test_submit_to_an_ended_or_unknown_job_says_so(lab: Lab) -> None:
    job = lab.create()
    lab.broker.run(lab.broker.cancel(job))
    assert lab.submit(job, 0, 0) == Answer(Code.ENDED, detail="finalizing")
    assert lab.submit("none", 0, 0) == Answer(Code.UNKNOWN_JOB)


# seal


def test_sealing_the_last_part_makes_the_job_run(lab: Lab) -> None:
    job = lab.create(parts=2)
    lab.fill(job, 1)
    assert lab.seal(job, 0, 1) == Answer(Code.OK)
    assert (lab.state(job), lab.broker.status(job).sealed) == (JobState.SUBMITTING, False)
    lab.fill(job, 1, part=1)
    assert lab.seal(job, 1, 1) == lab.seal(job, 1, 1) == Answer(Code.OK)
    assert (lab.state(job), lab.broker.status(job).sealed) == (JobState.RUNNING, True)


def test_what_was_read_of_a_part_is_kept_with_its_seal(lab: Lab) -> None:
    job, content = lab.create(parts=3), PartContent(7, "a" * 64)
    lab.fill(job, 1)
    seal = lab.broker.seal(job, 0, 1, content)
    assert lab.broker.run(seal) == lab.broker.run(seal) == Answer(Code.OK)
    lab.seal(job, 1, 0)
    assert lab.broker.contents(job, 3) == [content, None, None]
    for nonsense in ("x", f'{{"bytes":-1,"sha256":"{0:064}"}}', '{"bytes":null,"sha256":"../x"}', b"\xff"):
        lab.client.hset(lab.keys.job(job), "content:1", nonsense)
        assert lab.broker.contents(job, 3) == [content, None, None]


def test_a_job_that_is_opened_again_forgets_what_was_read(lab: Lab) -> None:
    job = lab.create()
    lab.broker.run(lab.broker.seal(job, 0, 0, PartContent(7, "a" * 64)))
    lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    assert lab.broker.contents(job, 1) == [None]


def test_sealing_finds_missing_blocks(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    assert lab.seal(job, 0, 3) == Answer(Code.MISSING, number=1)


def test_sealing_with_fewer_blocks_than_known_is_changed(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    assert lab.seal(job, 0, 2).code is Code.CHANGED
    lab.seal(job, 0, 3)
    assert lab.seal(job, 0, 2).code is Code.CHANGED


@pytest.mark.holds("Daft#7373")
def test_a_shortened_corpus_does_not_complete_a_reopened_job(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 4)
    lab.commit(job, lab.claim(job)[2:])
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    lab.fill(job, 2)
    assert lab.seal(job, 0, 2).code is Code.CHANGED  # two blocks are done, but not these two
    assert lab.state(job) is JobState.SUBMITTING


def test_sealing_when_all_is_done_moves_the_job_on(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    lab.commit(job, lab.claim(job))
    assert lab.seal(job, 0, 2).code is Code.OK
    assert (lab.state(job), lab.broker.outbox(), lab.broker.active_jobs()) == (JobState.FINALIZING, [job], [])
    assert lab.broker.unfinished()


def test_seal_of_an_ended_or_unknown_job_says_so(lab: Lab) -> None:
    job = lab.create()
    lab.broker.run(lab.broker.cancel(job))
    assert lab.seal(job, 0, 0) == Answer(Code.ENDED, detail="finalizing")
    assert lab.seal("none", 0, 0) == Answer(Code.UNKNOWN_JOB)


@pytest.mark.parametrize(("part", "block"), [(1, 0), (-1, 0), (0, -1), (0, MOST_BLOCKS)])
def test_blocks_that_the_job_cannot_have_are_errors_and_write_nothing(lab: Lab, part: int, block: int) -> None:
    job, broker = lab.create(), lab.broker
    entry = msgspec.structs.replace(make_entry(0, 0), part=part, block=block)
    commit = broker.commit(make_record(job, "s", []), [CommitBlock(part, block, entry.sum)])
    for step in (broker.submit(job, entry, 100), broker.seal(job, part, block), commit):
        with pytest.raises(redis.ResponseError, match="part"):
            broker.run(step)
    assert lab.broker.status(job).blocks == 0


# renew and release


def test_renew_names_the_entries_that_were_lost_and_keeps_the_delivery_count(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    mine = lab.claim(job)
    stream, entries = mine[0].stream, [c.entry for c in mine]
    lab.age(mine)
    assert [c.entry for c in lab.sweep(job, count=1)] == entries[:1]
    assert lab.broker.run(lab.broker.renew(stream, "w1", [*entries, "1-1"])) == [entries[0], "1-1"]
    assert lab.sweep(job, "w3") == []  # what was renewed is not idle
    lab.age(mine[1:])
    assert [c.deliveries for c in lab.sweep(job, "w3")] == [2, 2]


def test_renew_of_entries_of_an_ended_job_loses_all(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    [c] = lab.claim(job)
    lab.broker.run(lab.broker.cancel(job))
    assert lab.broker.run(lab.broker.renew(c.stream, "w1", [c.entry])) == [c.entry]
    assert lab.broker.run(lab.broker.release(c.stream, "w1", [c.entry])) == Answer(Code.OK)


def test_released_entries_are_claimable_at_once_and_count_as_never_delivered(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    mine = lab.claim(job)
    step = lab.broker.release(mine[0].stream, "w1", [c.entry for c in mine])
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    assert [(c.entry, c.deliveries) for c in lab.sweep(job)] == [(c.entry, 1) for c in mine]
    assert lab.broker.run(step).code is Code.OK  # w1 hands back what w2 holds by now: nothing happens
    assert lab.sweep(job, "w3") == []


def test_a_release_after_a_death_keeps_the_count_of_deaths(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    lab.age(lab.claim(job))
    [second] = lab.sweep(job)
    assert second.deliveries == 2
    lab.broker.run(lab.broker.release(second.stream, "w2", [second.entry]))
    [third] = lab.sweep(job, "w3")
    assert third.deliveries == 2
    assert lab.broker.pending(third.stream, RELEASED) == []


def test_what_a_dead_consumer_held_is_claimable_at_once_and_counts_its_death(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    first, _ = lab.claim(job)
    assert lab.broker.lost(job, ["w2"]) == {"w1": 2}
    assert lab.broker.lost(job, ["w1"]) == {}
    step = lab.broker.release(first.stream, "w1", [first.entry], died=True)
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    assert lab.broker.lost(job, ["w2"]) == {"w1": 1}
    assert [(c.entry, c.deliveries) for c in lab.sweep(job)] == [(first.entry, 2)]
    assert lab.broker.run(step).code is Code.OK  # w2 holds it by now: nothing happens
    assert lab.broker.lost(job, ["w1", "w2"]) == {}


# commit and adopt


def test_commit_clears_entries_counts_rows_and_records_the_shard(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    mine = lab.claim(job)
    assert lab.commit(job, mine[:2], "a") == Answer(Code.COMMITTED)
    status = lab.broker.status(job)
    assert (status.rows, status.failed, status.tokens, status.padded, status.done) == (18, 2, 10, 16, 2)
    assert (status.queued_bytes, lab.queued_bytes(), lab.broker.backlog(job), status.space) == (100, 100, 1, "space")
    assert list(lab.broker.shard_records(job)) == [msgspec.json.encode(make_record(job, "a", [(0, 0), (0, 1)]))]
    assert lab.broker.pending(mine[0].stream, "w1") == [mine[2].entry]


def test_commit_again_is_already_and_counts_nothing(lab: Lab) -> None:
    job = lab.sealed_job(2)
    mine = lab.claim(job)
    assert lab.commit(job, mine[:1], "a").code is Code.COMMITTED
    assert lab.commit(job, mine[:1], "a") == Answer(Code.ALREADY)
    assert lab.commit(job, mine[1:], "b").code is Code.COMMITTED
    assert lab.commit(job, mine[1:], "b") == Answer(Code.ALREADY)  # also when it was the one that ended the job
    assert lab.broker.status(job).rows == 18


def test_the_last_commit_moves_a_running_job_into_the_outbox_and_drops_its_stream(lab: Lab) -> None:
    job = lab.sealed_job(2)
    lab.commit(job, lab.claim(job))
    assert (lab.state(job), lab.broker.outbox(), lab.queued_bytes()) == (JobState.FINALIZING, [job], 0)
    assert not lab.client.exists(lab.keys.blocks(job))


def test_late_commit_of_a_finished_block_is_refused_and_clears_only_that_entry(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    mine = lab.claim(job)
    lab.age(mine[:1])
    assert lab.commit(job, lab.sweep(job), "theirs").code is Code.COMMITTED
    assert lab.commit(job, mine, "mine") == Answer(Code.CONFLICT, blocks=((0, 0),))
    assert lab.commit(job, mine, "mine") == Answer(Code.CONFLICT, blocks=((0, 0),))
    assert (lab.broker.status(job).done, lab.broker.backlog(job), len(lab.broker.shard_names(job))) == (1, 2, 1)
    assert lab.commit(job, mine[1:], "rest").code is Code.COMMITTED
    assert (lab.broker.status(job).rows, lab.queued_bytes()) == (27, 0)


def test_a_late_worker_counts_if_it_is_first(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    mine = lab.claim(job)
    lab.age(mine)
    theirs = lab.sweep(job)
    assert lab.commit(job, mine).code is Code.COMMITTED
    assert lab.commit(job, theirs).code is Code.CONFLICT


def test_commit_to_an_ended_job_is_dropped(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    mine = lab.claim(job)
    lab.broker.run(lab.broker.cancel(job))
    assert lab.commit(job, mine) == Answer(Code.DROPPED, detail="finalizing")
    lab.finalize(job, JobState.CANCELLED)
    assert lab.commit(job, mine) == Answer(Code.DROPPED, detail="cancelled")
    assert lab.broker.status(job).rows == 0


def test_what_is_in_hand_of_a_cancelled_job_counts_until_its_manifest_is_written(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 4)
    mine = lab.claim(job, count=3)
    lab.broker.run(lab.broker.cancel(job, grace_ms=HOUR_MS))
    assert lab.broker.run(lab.broker.take_finalize(job, HOUR_MS)) is None, "workers are waited for"
    assert lab.commit(job, mine[:1], "first").code is Code.COMMITTED
    assert lab.commit(job, mine[:1], "again") == Answer(Code.CONFLICT, blocks=((0, 0),))
    assert lab.broker.is_closing(job)
    assert lab.broker.run(lab.broker.take_finalize(job, HOUR_MS)) is None
    assert lab.commit(job, mine[1:2], "second").code is Code.COMMITTED
    lab.broker.free_finalize(job)  # as the grace ends
    lease = lab.broker.run(lab.broker.take_finalize(job, HOUR_MS))
    assert lease is not None
    assert not lab.broker.is_closing(job)
    assert lab.commit(job, mine[2:], "late") == Answer(Code.DROPPED, detail="finalizing")
    assert lab.broker.shard_names(job) == {"first", "second"}
    assert (lab.broker.status(job).done, lab.queued_bytes()) == (2, 0)


def test_a_shard_is_adopted_while_what_is_in_hand_of_a_cancelled_job_is_waited_for(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    mine = lab.claim(job, count=1)
    lab.broker.run(lab.broker.cancel(job, grace_ms=HOUR_MS))
    assert lab.adopt(job, [(0, 1)]).code is Code.COMMITTED
    assert lab.broker.is_closing(job), "nothing of what is in hand has come"
    assert lab.commit(job, mine).code is Code.COMMITTED
    assert lab.finalize(job, JobState.CANCELLED).verdict == "cancelled"


def test_a_cancelled_job_waits_no_longer_than_for_what_is_in_hand(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    mine = lab.claim(job, count=2)
    lab.broker.run(lab.broker.cancel(job, grace_ms=HOUR_MS))
    lab.commit(job, mine)
    assert lab.finalize(job, JobState.CANCELLED).verdict == "cancelled"
    idle = lab.create("/idle")
    lab.fill(idle, 3)
    lab.broker.run(lab.broker.release(lab.keys.blocks(idle), "w1", [c.entry for c in lab.claim(idle)]))
    lab.broker.run(lab.broker.cancel(idle, grace_ms=HOUR_MS))
    assert not lab.broker.is_closing(idle), "no worker holds what was handed back"
    lab.finalize(idle, JobState.CANCELLED)


def test_commit_to_a_reopened_job_counts_and_its_new_entry_is_never_worked_on(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    mine = lab.claim(job)
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    lab.fill(job, 2)
    assert lab.commit(job, mine).code is Code.COMMITTED
    assert [c.fields[b"block"] for c in lab.claim(job, "w2")] == [b"1"]
    assert (lab.queued_bytes(), lab.broker.backlog(job)) == (100, 1)


@pytest.mark.holds("One space")
def test_commit_of_another_space_is_refused(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    first, second = lab.claim(job)
    lab.commit(job, [first], space="bert")
    assert lab.commit(job, [second], space="mpnet") == Answer(Code.OTHER_SPACE, detail="bert")
    assert lab.broker.backlog(job) == 1


def test_int8_columns_have_the_ranges_of_the_first_that_says_them(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 4)
    one, two, *rest = lab.claim(job)
    first, second = (encode_ranges([in_int8(range)]) for range in (1, 2))
    assert lab.broker.ranges(job) == ""
    assert lab.broker.run(lab.broker.calibrate(job, first)) == Answer(Code.OK)
    assert lab.broker.run(lab.broker.calibrate(job, first)) == Answer(Code.OK)
    assert lab.broker.run(lab.broker.calibrate(job, second)) == Answer(Code.OTHER_RANGES, detail=first)
    assert lab.broker.ranges(job) == first
    assert lab.commit(job, [one], range=2) == Answer(Code.OTHER_RANGES, detail=first)
    assert lab.commit(job, [one], range=1).code is Code.COMMITTED
    assert lab.commit(job, [two]).code is Code.COMMITTED, "all of its rows failed"
    lab.broker.run(lab.broker.cancel(job))
    lab.finalize(job, JobState.CANCELLED)
    lab.broker.run(lab.broker.create(lab.spec()))
    lab.fill(job, 4)
    assert lab.commit(job, lab.claim(job), range=2) == Answer(Code.OTHER_RANGES, detail=first)
    assert len(rest) == lab.broker.backlog(job)


def test_adopting_says_what_int8_columns_mean_and_shards_of_other_ranges_are_left(lab: Lab) -> None:
    job = lab.sealed_job(2)
    assert lab.adopt(job, [(0, 0)], range=2).code is Code.COMMITTED
    known = encode_ranges([in_int8(2)])
    assert lab.broker.run(lab.broker.calibrate(job, encode_ranges([in_int8(1)]))).detail == known
    assert lab.adopt(job, [(0, 1)], range=1) == Answer(Code.OTHER_RANGES, detail=known)


def test_an_ended_or_unknown_job_learns_no_ranges_and_still_expires(lab: Lab) -> None:
    job, ranges = lab.cancelled_job(), encode_ranges([in_int8(1)])
    assert lab.broker.run(lab.broker.calibrate(job, ranges)) == Answer(Code.ENDED, detail="cancelled")
    assert lab.broker.run(lab.broker.calibrate("none", ranges)) == Answer(Code.UNKNOWN_JOB)
    assert lab.left_behind() == []


def test_commit_to_an_unknown_job_says_so(lab: Lab) -> None:
    assert lab.adopt("none", [(0, 0)]) == Answer(Code.UNKNOWN_JOB)
    with pytest.raises(JobUnknown):
        lab.broker.status("none")


def test_a_block_twice_in_one_shard_is_an_error(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    [c] = lab.claim(job)
    with pytest.raises(redis.ResponseError, match="0:0 twice"):
        lab.commit(job, [c, c])
    assert lab.broker.backlog(job) == 1


def test_adopted_blocks_are_dropped_by_those_who_claim_them_later(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 3)
    held = lab.claim(job, count=1)
    assert lab.adopt(job, [(0, 0), (0, 1)]).code is Code.COMMITTED
    assert [c.fields[b"block"] for c in lab.claim(job)] == [b"2"]
    lab.age(held)
    assert lab.sweep(job) == []
    assert (lab.queued_bytes(), lab.broker.backlog(job)) == (100, 1)


def test_adopting_what_the_corpus_no_longer_says_is_changed(lab: Lab) -> None:
    job = lab.sealed_job(2)
    other = CommitBlock(0, 1, make_entry(0, 1, variant=1).sum)
    answer = lab.commit_blocks(job, [other])
    assert (answer.code, answer.blocks) == (Code.CHANGED, ((0, 1),))
    answer = lab.adopt(job, [(0, 0), (0, 2)])  # the part ends at block 1
    assert (answer.code, answer.blocks) == (Code.CHANGED, ((0, 2),))
    assert lab.broker.status(job).done == 0


def test_dropping_leaves_blocks_alone_that_are_not_done(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 2)
    mine = lab.claim(job)
    lab.adopt(job, [(0, 0)])
    step = lab.broker.drop(job, [to_commit(c) for c in mine])
    assert lab.broker.run(step) == lab.broker.run(step) == Answer(Code.OK)
    assert (lab.broker.backlog(job), lab.queued_bytes()) == (1, 100)


# suspect


def test_a_suspect_is_noted_until_its_block_is_committed(lab: Lab) -> None:
    job = lab.create()
    lab.fill(job, 1)
    assert lab.broker.run(lab.broker.suspect(job, 0, 0, (4,))) == Answer(Code.OK)
    assert lab.broker.run(lab.broker.suspect(job, 0, 0, (3, 5))) == Answer(Code.OK)
    assert lab.broker.suspected(job, 0, 0) == (3, 5)
    assert lab.broker.run(lab.broker.suspect(job, 0, 0, ())) == Answer(Code.OK)
    assert lab.broker.suspected(job, 0, 0) == ()
    assert lab.broker.run(lab.broker.suspect(job, 0, 0, (3, 5))) == Answer(Code.OK)
    lab.commit(job, lab.claim(job))
    assert lab.broker.suspected(job, 0, 0) == ()


def test_suspects_of_an_ended_or_unknown_job_are_not_noted(lab: Lab) -> None:
    job = lab.cancelled_job()
    assert lab.broker.run(lab.broker.suspect(job, 0, 0, (4,))) == Answer(Code.ENDED, detail="cancelled")
    assert lab.broker.run(lab.broker.suspect("none", 0, 0, (4,))) == Answer(Code.UNKNOWN_JOB)


def test_answers_of_no_step_are_an_error(lab: Lab) -> None:
    step: Step[Answer] = lab.broker.cancel("none")
    with pytest.raises(BrokerError, match="another version"):
        step.parse([b"WHAT"])
