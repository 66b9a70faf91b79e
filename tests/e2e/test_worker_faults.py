"""One worker in this process, on a real server: what becomes of its blocks when something goes wrong."""

from __future__ import annotations

import hashlib
import shutil
import threading
from typing import Any

import msgspec
import pytest
from lab.hashing_reference import reference_vector
from lab.worker import BY_ID, TEXTS, Gate, ScriptedEngine, WorkerLab, finish, pack, refusal, reply_is_lost

from e2e.harness import assert_exact, read_errors, read_manifest, read_rows, wait_until
from embedstream.api.interactive import EmbedRequest, ask, vectors
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobState
from embedstream.metrics.metrics import DEVICE_BUSY, DUPLICATE_ROWS
from embedstream.queue import scripts
from embedstream.queue.broker import Broker
from embedstream.queue.steps import PROVEN
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import connect


def parts(lab: WorkerLab, output: str = "out") -> list[str]:
    return sorted(path.name for path in (lab.folder / output).glob("part-*"))


def test_a_job_comes_out_exactly(lab: WorkerLab) -> None:
    job = lab.job(TEXTS)
    worker = lab.start()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)
    worker.stop()
    assert worker.error is None
    assert not lab.broker.workers()


def test_equal_texts_enter_the_model_once_and_all_their_rows_are_in_the_dataset(lab: WorkerLab) -> None:
    entered: list[str] = []
    texts = [TEXTS[i % 5] for i in range(400)]
    first = lab.job(texts, rows_per_block=100)
    worker = lab.start(ScriptedEngine(entered.extend))
    finish(lab, first)
    second = lab.job([*texts, "another text"], rows_per_block=100, output="other")
    finish(lab, second)
    for job, output, given in ((first, "out", texts), (second, "other", [*texts, "another text"])):
        assert_exact(lab.folder / output, {f"t{row}": text for row, text in enumerate(given)})
        manifest = read_manifest(lab.folder / output)
        assert manifest["duplicates"] == lab.broker.status(job).duplicates > 390
    taken = [read_manifest(lab.folder / output)["duplicates"] for output in ("out", "other")]
    assert taken[1] == 400, "what the first job computed is not remembered"
    assert set(entered) == {*TEXTS[:5], "another text"}
    assert len(entered) == 400 + 401 - sum(taken)
    counted: Any = worker.worker.meter.registry.get_sample_value
    counter = (DUPLICATE_ROWS.name, {"queue": lab.broker.queue})
    wait_until(lambda: counted(*counter) == sum(taken), "the metric to count them")


def test_vector_and_hash_are_of_the_prompt_and_the_text(lab: WorkerLab) -> None:
    job = lab.job(TEXTS[:4], prompt="passage: ")
    lab.start()
    finish(lab, job)
    rows = read_rows(lab.folder / "out")
    assert len(rows) == 4
    for row in rows:
        entered = "passage: " + BY_ID[row["id"]]
        assert row["embedding"] == pytest.approx(reference_vector(entered), abs=1e-6)
        assert row["input_hash"] == hashlib.blake2b(entered.encode(), digest_size=16).digest()


def test_blocks_that_hold_nothing_but_refusals_are_committed(lab: WorkerLab) -> None:
    job = lab.job([refusal(i) for i in range(20)], rows_per_block=8)
    lab.start()
    finish(lab, job, JobState.FAILED)
    assert len(read_errors(lab.folder / "out")) == 20
    assert read_manifest(lab.folder / "out")["rows"] == 0


def test_what_others_commit_first_is_left_out_of_the_shard(lab: WorkerLab) -> None:
    gate = Gate()
    job = lab.job(TEXTS, rows_per_block=8)
    slow = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    lab.expire_leases(job, blocks=2)
    lab.start()
    wait_until(lambda: lab.broker.status(job).done == 2, "the other worker's shard")
    others = parts(lab)
    counted: Any = slow.worker.meter.registry.get_sample_value
    busy = (DEVICE_BUSY.name, {"queue": lab.broker.queue})
    wait_until(lambda: counted(*busy) > 0.5, "the slow worker to have worked for long")
    gate.open.set()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)
    pace: Any = lab.broker.client.hgetall(lab.broker.keys.pace)
    assert int(pace[b"ms"]) > 500, "the work for a shard that was refused is lost from the pace"
    shards = {shard["file"]: shard["rows"] for shard in read_manifest(lab.folder / "out")["shards"]}
    assert sorted(shards) == parts(lab), "the shard that was refused was left behind"
    assert sum(shards.pop(other) for other in others) == 16
    assert sum(shards.values()) == 48
    slow.stop()
    assert slow.error is None


@pytest.mark.parametrize("late_fails", [True, False], ids=["the late one fails it", "the first one fails it"])
def test_a_row_that_fails_in_one_of_two_workers_ends_once_in_a_redis_output(lab: WorkerLab, late_fails: bool) -> None:
    output = f"redis:?prefix={lab.broker.queue}:"
    job = lab.create(msgspec.structs.replace(lab.spec(), output=output))
    lab.submit(job, pack(TEXTS, 8))
    gate, nan = Gate(), [TEXTS[3]]
    late = lab.start(ScriptedEngine(gate, nan if late_fails else ()), roots=["redis:"])
    assert gate.arrived.wait(30)
    lab.expire_leases(job, blocks=2)
    lab.start(ScriptedEngine(nan=() if late_fails else nan), roots=["redis:"])
    wait_until(lambda: lab.broker.status(job).done == 2, "the other worker's shard")
    gate.open.set()
    finish(lab, job)
    late.stop()
    sink = open_sink(output, queue_url=lab.url)
    vectors_of = sorted(str(id) for batch in sink.read(["id"]) for id in batch.column("id").to_pylist())
    errors = [error.id for error in sink.read_errors()]
    assert sorted([*vectors_of, *map(str, errors)]) == sorted(BY_ID)
    assert errors == ([] if late_fails else ["t3"])
    assert not lab.broker.client.exists(f"{lab.broker.queue}:_pending")


def test_a_job_cancelled_while_its_blocks_are_in_the_model_leaves_no_shard(lab: WorkerLab) -> None:
    gate = Gate()
    job = lab.job(TEXTS)
    worker = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    lab.broker.run(lab.broker.cancel(job))
    gate.open.set()
    finish(lab, job, JobState.CANCELLED)
    next_one = lab.job(TEXTS[:8], output="next")
    finish(lab, next_one)  # what came before is through the pipeline by now
    assert parts(lab) == []
    assert lab.broker.status(job).rows == 0
    worker.stop()
    assert worker.error is None


def test_a_job_reopened_while_old_blocks_are_in_the_model_comes_out_exactly(lab: WorkerLab) -> None:
    gate = Gate()
    job = lab.job(TEXTS)
    worker = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    lab.broker.run(lab.broker.cancel(job))
    wait_until(lambda: lab.ended(job), "the cancelled job's manifest")
    lab.job(TEXTS)
    gate.open.set()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)
    assert lab.broker.status(job).rows == len(TEXTS)
    worker.stop()
    assert worker.error is None


def test_the_shard_of_a_job_that_redis_lost_stays_for_adoption(lab: WorkerLab) -> None:
    gate = Gate()
    job = lab.job(TEXTS)
    worker = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    spec = lab.broker.status(job).spec
    lab.empty_redis()
    gate.open.set()
    wait_until(lambda: parts(lab), "the shard")
    worker.stop()
    assert worker.error is None
    (shard,) = FolderSink(spec.output, spec).find_shards()
    assert shard.rows == len(TEXTS)


@pytest.mark.holds("Durable before acknowledged")
def test_an_output_that_cannot_be_written_for_a_while_is_waited_for(
    lab: WorkerLab, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    job = lab.job(TEXTS)
    worker = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    shutil.rmtree(lab.folder / "out")
    (lab.folder / "out").write_text("in the way")
    gate.open.set()
    wait_until(lambda: "trying again" in caplog.text, "a failed try")
    assert not lab.ended(job)
    (lab.folder / "out").unlink()
    (lab.folder / "out").mkdir()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)
    worker.stop()
    assert worker.error is None


def test_an_output_given_up_does_not_hold_up_another_job(lab: WorkerLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream_worker.write.OUTPUT_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("embedstream_worker.write.LOOK_AGAIN_SECONDS", 0.5)
    monkeypatch.setattr("embedstream_worker.jobs.LOOK_AGAIN_SECONDS", 0.5)
    gate = Gate()
    job = lab.job(TEXTS)
    worker = lab.start(ScriptedEngine(gate))
    assert gate.arrived.wait(30)
    shutil.rmtree(lab.folder / "out")
    (lab.folder / "out").write_text("in the way")
    other = lab.job(TEXTS, output="other")
    gate.open.set()
    finish(lab, other)
    assert not lab.ended(job)
    (lab.folder / "out").unlink()
    finish(lab, job)
    assert_exact(lab.folder / "out", BY_ID)
    worker.stop()
    assert worker.error is None


@pytest.mark.holds("Durable before acknowledged")
def test_a_commit_whose_reply_is_lost_counts_once(lab: WorkerLab) -> None:
    script = scripts.load("commit")
    commit = script.sha
    lab.broker.client.script_load(script.body)  # a server that does not know it yet answers the first run otherwise
    lost = threading.Event()
    job = lab.job(TEXTS)
    lossy = reply_is_lost("evalsha", when=lambda _reply, sha, *_: sha == commit, on_loss=lost.set)
    lab.start(connect=lossy)
    finish(lab, job)
    assert lost.is_set()
    assert_exact(lab.folder / "out", BY_ID)
    status = lab.broker.status(job)
    assert (status.rows, status.done) == (len(TEXTS), 8)
    assert len(parts(lab)) == 1


def test_blocks_whose_claim_was_never_answered_are_handed_back_at_once(lab: WorkerLab) -> None:
    lost = threading.Event()
    job = lab.job(TEXTS)
    # With leases of ten minutes the job ends now only if nobody waits for them.
    lab.start(connect=reply_is_lost("xreadgroup", when=lambda reply, *_: bool(reply), on_loss=lost.set))
    finish(lab, job)
    assert lost.is_set()
    assert_exact(lab.folder / "out", BY_ID)


def test_a_worker_that_stops_finishes_its_batch_and_hands_back_the_rest(lab: WorkerLab) -> None:
    seen: list[list[str]] = []
    gate = Gate()

    def before(texts: list[str]) -> None:
        seen.append(texts)
        gate(texts)

    # Rows of one length, so that batches are cut in the order of the corpus: 8 rows of 8 tokens each.
    texts = [f"{i:032d}" for i in range(64)]
    job = lab.job(texts, rows_per_block=8)
    worker = lab.start(ScriptedEngine(before), batch_tokens=64)
    assert gate.arrived.wait(30)
    worker.worker.life.stop()
    gate.open.set()
    worker.join()
    assert worker.error is None
    assert len(seen) == 1, "it began another batch after it was told to stop"
    assert lab.broker.status(job).rows == 8
    assert lab.owners(job) == {"released": 7}
    again = lab.broker.sweep("w2", job, 3_600_000, 100)
    assert [claimed.deliveries for claimed in again] == [1] * 7, "handing back looked like a death"


def test_a_stage_that_fails_ends_the_worker_and_says_why(lab: WorkerLab, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("intake.Intake._step", "tokenize.Tokenize._group", "infer.Infer._begin", "write.Write._add"):
        with monkeypatch.context() as patched:

            def broken(*_args: object, stage: str = stage) -> None:
                raise RuntimeError(f"{stage} is broken")

            patched.setattr(f"embedstream_worker.{stage}", broken)
            engine = ScriptedEngine()
            lab.job(TEXTS, output=stage)
            worker = lab.start(engine)
            worker.join()
        assert isinstance(worker.error, RuntimeError), stage
        assert stage in str(worker.error)
        assert engine.closed
        assert not lab.broker.workers(), "it did not take its leave"


def test_a_device_that_breaks_ends_the_worker_and_blames_no_text(lab: WorkerLab) -> None:
    class Broken(ScriptedEngine):
        def warm_up(self, batch_tokens: int) -> None:
            if gate.arrived.is_set():
                raise RuntimeError("the device fell off the bus")
            super().warm_up(batch_tokens)

    gate = Gate()
    gate.open.set()

    def before(texts: list[str]) -> None:
        gate(texts)
        raise RuntimeError("the device fell off the bus")

    job = lab.job(TEXTS)
    worker = lab.start(Broken(before))
    worker.join()
    assert "fell off the bus" in str(worker.error)
    assert (lab.broker.status(job).rows, lab.broker.status(job).failed) == (0, 0)


@pytest.mark.holds("infinity#242")
def test_rows_that_fail_cost_only_themselves(lab: WorkerLab) -> None:
    def before(texts: list[str]) -> None:
        if TEXTS[5].rstrip("\0") in texts:
            raise ValueError("cannot embed this")

    job = lab.job(TEXTS)
    lab.start(ScriptedEngine(before, nan=[TEXTS[40]]))
    finish(lab, job)
    good = {id: text for id, text in BY_ID.items() if id not in ("t5", "t40")}
    assert_exact(lab.folder / "out", good)
    errors = {error["id"]: error for error in read_errors(lab.folder / "out")}
    assert {id: (error["code"], error["line"]) for id, error in errors.items()} == {
        "t5": ("engine_error", 6),
        "t40": ("not_finite", 41),
    }
    assert "cannot embed this" in errors["t5"]["message"]


@pytest.mark.holds("kaapi-backend#723")
def test_a_job_in_which_every_row_fails_ends_failed(lab: WorkerLab) -> None:
    job = lab.job(TEXTS)
    lab.start(ScriptedEngine(nan=TEXTS))
    finish(lab, job, JobState.FAILED)
    assert len(read_errors(lab.folder / "out")) == len(TEXTS)


def test_an_interactive_request_is_answered_before_the_next_batch_of_a_job(lab: WorkerLab) -> None:
    gate, order = Gate(), list[list[str]]()

    def before(texts: list[str]) -> None:
        order.append(texts)
        if texts != ["now"]:
            gate(texts)

    job = lab.job([f"{i:032d}" for i in range(64)])
    lab.start(ScriptedEngine(before), batch_tokens=64)
    assert gate.arrived.wait(30)
    answers: list[Any] = []

    def call() -> None:
        broker = Broker(connect(lab.url), lab.broker.queue)
        answers.append(ask(broker, EmbedRequest(texts=("now",)), 30))

    caller = threading.Thread(target=call)
    caller.start()
    client: Any = lab.broker.client
    wait_until(lambda: client.exists(lab.broker.keys.interactive), "the request")
    wait_until(lambda: client.xpending(lab.broker.keys.interactive, "workers")["pending"], "the worker to take it")
    gate.open.set()
    caller.join(30)
    finish(lab, job)
    assert order[1] == ["now"]
    assert vectors(answers[0], 1)[0] == pytest.approx(reference_vector("now"), abs=1e-6)


def test_a_prompt_that_another_worker_tries_is_waited_for_and_two_deaths_do_not_end_its_job(lab: WorkerLab) -> None:
    job = lab.job(TEXTS[:4], prompt="passage: ")
    other = lab.job(TEXTS[:4], output="other")
    record = WorkerRecord(
        name="w9", host="h", pid=1, model="m", fingerprint="", engine="", device="", dtype="", roots=(), state="ready",
        started=0.0,
    )  # fmt: skip
    lab.broker.heartbeat(record, 60)
    lab.broker.run(lab.broker.suspect_prompt(job, ("dead", "w9")))
    lab.start()
    finish(lab, other)
    assert lab.broker.state(job) == JobState.RUNNING
    assert lab.broker.prompt_tries(job) == ("dead", "w9")
    lab.broker.leave("w9")
    finish(lab, job)
    assert lab.broker.prompt_tries(job) == (PROVEN,)
