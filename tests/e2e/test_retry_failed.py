"""Failed rows of a finished dataset run again: what succeeds now is added to it, and nothing is ever there twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import RedisServer
from lab.worker import Running, ScriptedEngine, WorkerLab, worker_lab

from e2e.harness import assert_exact, assert_no_leftovers, read_errors, read_manifest, run, start_submit, wait_until
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import job_id
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Code
from embedstream.server.connection import connect
from embedstream_coordinator import compaction
from embedstream_worker.housekeeping import Housekeeping

ROWS = 600
TEXTS = {f"t{i}": f"text number {i} " + "word " * (i % 7) for i in range(ROWS)}
FAILING = [f"t{i}" for i in (3, 40, 41, 300, 599)]
BROKEN = {2: "{broken", 301: '{"id": "t5", "text": "twice"}'}
"""Lines that no retry can help, by where they are put in."""


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made


def corpus(folder: Path) -> Path:
    lines = [json.dumps({"id": id, "text": text}) for id, text in TEXTS.items()]
    for at, line in BROKEN.items():
        lines.insert(at, line)
    path = folder / "c.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(lab: WorkerLab, *more: object, output: object = None, fleet: bool = True) -> list[object]:
    where = ["--redis", lab.url] if fleet else []
    out = output or lab.folder / "out"
    return [corpus(lab.folder), "-o", out, "--queue", lab.broker.queue, "--model", "hashing", "--json", *where, *more]


def broken(ids: list[str]) -> ScriptedEngine:
    """An engine that gives NaN for the texts of these rows."""
    return ScriptedEngine(nan=[TEXTS[id].rstrip("\0") for id in ids])


def start(lab: WorkerLab, engine: ScriptedEngine | None = None) -> Running:
    return lab.start(engine, roots=(str(lab.folder), "redis:"))


def finished_with_failures(lab: WorkerLab, output: object = None, failing: list[str] = FAILING) -> None:
    worker = start(lab, broken(failing))
    done = run("embed-submit", *command(lab, output=output))
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["failed"] == len(failing) + len(BROKEN)
    worker.stop()


def good(*but: str) -> dict[str, str]:
    return {id: text for id, text in TEXTS.items() if id not in but}


def codes(output: Path) -> list[tuple[int, str]]:
    return [(error["line"], error["code"]) for error in read_errors(output)]


REFUSED = [(3, "invalid_json"), (302, "duplicate_id")]


@pytest.mark.parametrize("fleet", [True, False], ids=["fleet", "embedded"])
def test_rows_that_failed_in_a_worker_are_added_and_refused_ones_stay(lab: WorkerLab, fleet: bool) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    before = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    if fleet:
        start(lab)
    again = run("embed-submit", *command(lab, "--retry-failed", fleet=fleet))
    assert again.returncode == 3, again.stderr
    assert "5 failed rows again" in again.stderr
    report = json.loads(again.stdout)
    assert (report["state"], report["rows"], report["failed"]) == ("completed", ROWS, len(BROKEN))
    assert_exact(out, TEXTS)
    assert codes(out) == REFUSED
    assert_no_leftovers(out)
    assert {name: (out / name).read_bytes() for name in before} == before, "a shard was touched"
    manifest = read_manifest(out)
    assert (
        sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"] == manifest["parts"][0]["rows"] == ROWS
    )
    listed = [shard["errors"] for shard in manifest["shards"] if "errors" in shard]
    assert sum(each["rows"] for each in listed) == manifest["failed"] == manifest["parts"][0]["failed"]
    assert sorted(each["file"] for each in listed) == sorted(path.name for path in out.glob("_errors-*"))
    tables = [pa.ipc.open_file(str(out / each["file"])).read_all() for each in listed]
    errors = [code for table in tables for code in table["code"].to_pylist()]
    assert sorted(map(str, errors)) == ["duplicate_id", "invalid_json"], (
        "who reads all error files is told of rows that are there"
    )
    verified = run("embed-verify", out, "--corpus", lab.folder / "c.jsonl")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "not listed" not in verified.stdout + verified.stderr
    if fleet:
        assert_status_shows_the_retry(lab, job_id(lab.broker.queue, str(out)))
    plain = run("embed-submit", *command(lab, fleet=fleet))
    assert plain.returncode == 3
    assert json.loads(plain.stdout) == report
    nothing = run("embed-submit", *command(lab, "--retry-failed", fleet=fleet))
    assert nothing.returncode == 3, nothing.stderr
    assert json.loads(nothing.stdout) == report
    assert read_manifest(out) == manifest


def assert_status_shows_the_retry(lab: WorkerLab, job: str) -> None:
    (retry,) = json.loads(run("embed-status", job, "--redis", lab.url, "--json").stdout)["retries"]
    assert (retry["state"], retry["rows"], retry["failed"]) == ("completed", len(FAILING), 0)
    shown = run("embed-status", job, "--redis", lab.url).stdout
    assert f"  5 of its failed rows run again by job {retry['job']}: completed, 5 written, 0 failed\n" in shown
    listing = run("embed-status", "--redis", lab.url, "--queue", lab.broker.queue).stdout
    assert f"595 of 602 rows, 7 FAILED (run again by job {retry['job']})" in listing
    assert f"job {retry['job']}  completed  failed rows of job {job}  5 of 5 rows" in listing


def test_what_fails_again_stays_an_error_and_can_be_tried_once_more(lab: WorkerLab) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    worker = start(lab, broken(FAILING[:2]))
    first = run("embed-submit", *command(lab, "--retry-failed"))
    assert (first.returncode, json.loads(first.stdout)["failed"]) == (3, 4), first.stderr
    assert_exact(out, good(*FAILING[:2]))
    assert codes(out) == [REFUSED[0], (5, "not_finite"), (42, "not_finite"), REFUSED[1]]
    worker.stop()
    start(lab)
    second = run("embed-submit", *command(lab, "--retry-failed", "--max-errors", "2"))
    assert (second.returncode, json.loads(second.stdout)["failed"]) == (0, 2), second.stderr
    assert_exact(out, TEXTS)
    assert codes(out) == REFUSED
    assert len(read_manifest(out)["retries"]) == 2


def test_a_dataset_in_which_every_row_failed_is_filled(lab: WorkerLab) -> None:
    worker = start(lab, broken(list(TEXTS)))
    done = run("embed-submit", *command(lab))
    assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "failed"), done.stderr
    again = run("embed-submit", *command(lab, "--retry-failed"))
    assert (again.returncode, json.loads(again.stdout)["rows"]) == (1, 0), again.stderr
    worker.stop()
    start(lab)
    again = run("embed-submit", *command(lab, "--retry-failed"))
    assert (again.returncode, json.loads(again.stdout)["state"]) == (3, "completed"), again.stderr
    assert_exact(lab.folder / "out", TEXTS)
    assert codes(lab.folder / "out") == REFUSED
    # The first job failed; whoever opens and ends it once more takes nothing away.
    before, spec = read_manifest(lab.folder / "out"), lab.broker.status(read_manifest(lab.folder / "out")["job"]).spec
    assert lab.broker.run(lab.broker.create(spec)).code is Code.REOPENED
    assert lab.broker.run(lab.broker.cancel(spec.job)).code is Code.OK
    wait_until(lambda: lab.ended(spec.job), "the job to end once more")
    assert read_manifest(lab.folder / "out") == before


def test_in_a_redis_output_rows_leave_the_errors_when_the_manifest_counts_them(lab: WorkerLab) -> None:
    output = f"redis:?prefix={lab.broker.queue}:"
    finished_with_failures(lab, output)
    sink = open_sink(output, queue_url=lab.url)
    worker = start(lab, broken(FAILING[:1]))
    again = run("embed-submit", *command(lab, "--retry-failed", output=output))
    assert again.returncode == 3, again.stderr
    report = json.loads(again.stdout)
    assert (report["rows"], report["failed"]) == (ROWS - 1, 3)
    ids = [str(id) for batch in sink.read(["id"]) for id in batch.column("id").to_pylist()]
    assert sorted(ids) == sorted(good(FAILING[0]))
    assert [(error.line, error.code) for error in sink.read_errors()] == [REFUSED[0], (5, "not_finite"), REFUSED[1]]
    worker.stop()
    verified = run("embed-verify", output, "--redis", lab.url, "--corpus", lab.folder / "c.jsonl")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    plain = run("embed-submit", *command(lab, output=output))
    assert json.loads(plain.stdout) == report
    client = connect(lab.url)
    assert not client.exists(f"{lab.broker.queue}:_pending")


@pytest.mark.parametrize(
    "point",
    [
        *("create.after", "submit.after", "seal.after", "take_finalize.after"),
        *(f"file.{moment}#{n}" for n in (1, 2, 3, 4) for moment in ("written", "renamed")),
        *("finalized.before", "finalized.after"),
    ],
)
def test_killed_anywhere_the_same_command_ends_well_and_no_row_is_ever_missing_or_twice(
    lab: WorkerLab, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    monkeypatch.setattr(Housekeeping, "finalize", lambda _: None)  # the command does it, and dies of it
    start(lab)
    args = command(lab, "--retry-failed")
    killed = run("embed-submit", *args, EMBEDSTREAM_FAILPOINTS=f"{point}=kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    manifest = read_manifest(out)
    assert manifest["failed"] in (len(BROKEN), len(BROKEN) + len(FAILING))
    assert_exact(out, TEXTS if manifest["failed"] == len(BROKEN) else good(*FAILING))
    assert len(read_errors(out)) >= manifest["failed"]
    assert len(list(open_sink(str(out)).read_errors())) == manifest["failed"]
    for job in lab.broker.outbox():  # the lease of the dead one runs out
        lab.broker.client.zadd(lab.broker.keys.finalize, {job: 0})
    again = run("embed-submit", *args)
    assert again.returncode == 3, again.stderr
    assert_exact(out, TEXTS)
    assert codes(out) == REFUSED


def test_a_cancelled_retry_leaves_the_dataset_as_it_was_and_goes_on(lab: WorkerLab) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    before = (out / "_manifest.json").read_bytes()
    waiting = start_submit(*command(lab, "--retry-failed"))
    (job,) = wait_until(
        lambda: [job for job in lab.broker.active_jobs() if lab.broker.state(job) == "running"], "a job"
    )
    assert run("embed-cancel", job, "--redis", lab.url).returncode == 0
    waiting.communicate(timeout=60)
    assert waiting.returncode == 4
    assert (out / "_manifest.json").read_bytes() == before
    start(lab)
    again = run("embed-submit", *command(lab, "--retry-failed"))
    assert again.returncode == 3, again.stderr
    assert_exact(out, TEXTS)


def test_redis_emptied_in_the_middle_of_a_retry_doubles_nothing(lab: WorkerLab) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    worker = start(lab)
    assert run("embed-submit", *command(lab, "--retry-failed", "--detach")).returncode == 0
    wait_until(lambda: read_manifest(out)["failed"] == len(BROKEN), "the rows to be added")
    worker.stop()
    client = connect(lab.url)
    client.unlink(*client.keys(f"embedstream:{{{lab.broker.queue}}}:*"))
    assert Broker(client, lab.broker.queue).active_jobs() == []
    start(lab)
    again = run("embed-submit", *command(lab, "--retry-failed"))
    assert again.returncode == 3, again.stderr
    assert_exact(out, TEXTS)


def test_a_corpus_that_changed_is_refused_and_the_dataset_left_alone(lab: WorkerLab) -> None:
    finished_with_failures(lab)
    before = read_manifest(lab.folder / "out")
    args = command(lab, "--retry-failed")
    path = lab.folder / "c.jsonl"
    path.write_text(path.read_text().replace("text number 42 ", "text number 43 "))
    refused = run("embed-submit", *args)
    assert refused.returncode == 2, refused.stdout
    assert "c.jsonl: changed since this job began (block 0 differs, lines 1 to 256)" in refused.stderr
    assert read_manifest(lab.folder / "out") == before


@pytest.mark.parametrize("state", ["nothing", "cancelled"])
def test_an_output_that_is_not_finished_is_refused(lab: WorkerLab, state: str) -> None:
    if state == "cancelled":
        run("embed-submit", *command(lab, "--detach"))
        (job,) = lab.broker.active_jobs()
        run("embed-cancel", job, "--redis", lab.url)
    refused = run("embed-submit", *command(lab, "--retry-failed"))
    assert refused.returncode == 2
    assert "--retry-failed: " in refused.stderr
    assert "without it first" in refused.stderr


def test_a_dataset_with_rows_that_were_run_again_can_be_merged(lab: WorkerLab, monkeypatch: pytest.MonkeyPatch) -> None:
    out = lab.folder / "out"
    finished_with_failures(lab)
    worker = start(lab, broken(["t40"]))
    assert run("embed-submit", *command(lab, "--retry-failed")).returncode == 3
    worker.stop()
    monkeypatch.setattr(compaction, "MOST_SHARE", 1000.0)
    before, after = compaction.compact(str(out), 200_000)
    assert after > before, "the groups are smaller than the shards: all is cut anew"
    assert_exact(out, good("t40"))
    assert codes(out) == [(3, "invalid_json"), (42, "not_finite"), (302, "duplicate_id")]
    verified = run("embed-verify", out, "--corpus", lab.folder / "c.jsonl")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    start(lab)
    assert run("embed-submit", *command(lab, "--retry-failed")).returncode == 3
    assert_exact(out, TEXTS)
    assert codes(out) == REFUSED
