"""embed-status while real workers come, work, die and leave."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_engines import faulty

from e2e.harness import BIN, Fleet, environment, fleet, run, wait_until, write_corpus
from embedstream.jobs import job_id


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def status(workers: Fleet, *args: object) -> Any:
    done = run("embed-status", *args, "--redis", workers.url, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lines(workers: Fleet, *args: object) -> str:
    done = run("embed-status", *args, "--redis", workers.url)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(workers: Fleet, corpus: Path, output: Path) -> str:
    args = ["-o", output, "--redis", workers.url, "--model", "hashing", "--detach"]
    done = run("embed-submit", corpus, *args)
    assert done.returncode == 0, done.stderr
    return job_id("hashing", str(output))


def slow_corpus(path: Path, rows: int) -> None:
    """Each batch of its texts takes 0.2 s."""
    path.write_text("".join(f'{{"id": "{i}", "text": "[[fault:slow]] {i}"}}\n' for i in range(rows)))


def test_a_job_shows_progress_rates_and_what_is_left_while_it_runs(workers: Fleet, tmp_path: Path) -> None:
    slow_corpus(tmp_path / "c.jsonl", 2000)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    worker = workers.start_worker("--batch-tokens", 30, **faulty(tmp_path))
    seen = wait_until(lambda: (s := status(workers, job))["rows_in_hand"] and s["seconds_left"] and s, "rows in hand")
    assert seen["state"] == "running"
    assert seen["stalled"] is False
    assert 0 < seen["progress"] < 1
    assert seen["progress"] == pytest.approx(seen["rows_in_hand"] / 2000, abs=0.001)
    most_rows_in_a_batch = 30 / 4  # texts of 16 bytes, tokens of 4
    assert 0 < seen["rows_per_second"] <= 5 * most_rows_in_a_batch
    assert seen["tokens_per_second"] > seen["rows_per_second"]
    left = (2000 - seen["rows_in_hand"]) / seen["rows_per_second"]
    assert seen["seconds_left"] == pytest.approx(left, rel=0.05)
    (share,) = seen["workers"]
    assert (share["rows"], share["state"]) == (0, "ready")
    assert share["rows_per_second"] == seen["rows_per_second"]
    shown = lines(workers, job)
    assert re.search(r"running  [1-9]\d* of 2,000 rows  \d+ %, .* left", shown)
    assert re.search(r"\d+ more rows computed and not yet written", shown)
    assert re.search(r"\d+ rows/s, \d+ tokens/s, padding", shown)
    (queue,) = status(workers)["queues"]
    assert (queue["queue"], queue["blocks"], queue["claimed_blocks"]) == ("hashing", 8, 8)
    assert queue["drain_seconds"] is None, "nothing is committed yet, so nobody knows"
    listing = lines(workers)
    assert re.search(
        r"queue hashing: 1 worker, 8 blocks queued \(8 in workers' hands\), the oldest for \S+ s\n", listing
    )
    assert "not known" not in listing, "the job's own line says how long it takes"
    assert re.search(rf"worker .*-{worker.pid}-\w+  ready  hashing .*  \d+ rows/s", listing)


def test_a_finished_job_shows_who_wrote_it_and_what_failed(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 20_000)
    with (tmp_path / "c.jsonl").open("a") as corpus:
        corpus.write('{"id": "empty", "text": ""}\n')
    for _ in range(2):
        workers.start_worker("--window-tokens", 4000)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    wait_until(lambda: workers.broker.status(job).state.ended, "the job to end")
    seen = status(workers, job)
    assert (seen["state"], seen["rows"], seen["failed"], seen["progress"], seen["seconds_left"]) == (
        *("completed", 20_000, 1),
        *(1.0, 0.0),
    )
    assert len(seen["workers"]) == 2
    assert sum(each["rows"] for each in seen["workers"]) == 20_000
    assert sum(each["share"] for each in seen["workers"]) == pytest.approx(1, abs=0.001)
    assert seen["rows_per_second"] == pytest.approx(20_000 / seen["seconds"], rel=0.01)
    shown = lines(workers, job)
    assert "20,000 of 20,001 rows, 1 FAILED" in shown
    assert f"1 row failed (0.005 %): see {tmp_path}/out/_errors.jsonl" in shown
    for each in seen["workers"]:
        assert re.search(rf"{100 * each['share']:.1f} %  {each['name']}  {each['rows']:,} rows, ready", shown)


def test_a_dead_worker_disappears_by_itself_and_its_rows_stay_its_own(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 500)
    worker = workers.start_worker()
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    wait_until(lambda: workers.broker.status(job).state.ended, "the job to end")
    (record,) = workers.broker.workers()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert [each["name"] for each in status(workers)["queues"][0]["workers"]] == [record.name]
    workers.broker.client.pexpire(workers.broker.keys.worker(record.name), 1)  # as it does by itself, in seconds
    wait_until(lambda: not status(workers)["queues"][0]["workers"], "the worker to be forgotten")
    (share,) = status(workers, job)["workers"]
    assert share == {"name": record.name, "rows": 500, "share": 1.0, "state": "gone", "rows_per_second": 0.0}


def test_a_job_that_nobody_works_on_is_stalled_after_a_minute_and_says_what_to_do(
    workers: Fleet, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "c.jsonl", 500)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    client: Any = workers.broker.client
    before = (int(client.time()[0]) - 3600) * 1000
    young = status(workers, job)
    assert young["stalled"] is False
    assert "waiting for a worker on queue hashing" in young["waits_for"], "at once, not after a minute"
    client.hset(workers.broker.keys.job(job), mapping={"pushed": before, "committed": before})
    seen = status(workers, job)
    assert (seen["stalled"], seen["seconds_left"], seen["rows_per_second"]) == (True, None, 0.0)
    assert seen["waits_for"].startswith("waiting for a worker on queue hashing (")
    assert f": start one with `embed-worker --model hashing --redis {workers.url}`" in seen["waits_for"]
    assert lines(workers, job).count("start one") == 1
    assert f"job {job}  running  stalled" in lines(workers)
    assert "how long they take is not known before the first commit" in lines(workers)
    workers.broker.client.hset(workers.broker.keys.pace, mapping={"tokens": 5000, "bytes": 5000, "ms": 1000})
    assert "of work by one worker" in lines(workers)


def test_a_job_that_workers_refuse_is_listed_with_the_reason(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 500)
    workers.start_worker()
    args = ["-o", tmp_path / "out", "--redis", workers.url, "--model", "other", "--queue", "hashing", "--detach"]
    assert run("embed-submit", tmp_path / "c.jsonl", *args).returncode == 0
    why = "refused by a worker: it asks for model other, this worker serves hashing"
    wait_until(lambda: f"    {why}\n" in lines(workers), "the reason in the listing")
    assert "2 blocks that no live worker accepts\n" in lines(workers)
    assert lines(workers, job_id("hashing", str(tmp_path / "out"))).count(why) == 1
    assert status(workers)["queues"][0]["tokens"] == 0


def test_a_watched_job_is_shown_live_until_it_has_ended(workers: Fleet, tmp_path: Path) -> None:
    slow_corpus(tmp_path / "c.jsonl", 20)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    ours, theirs = pty.openpty()
    command = [str(BIN / "embed-status"), job, "--redis", workers.url, "--watch"]
    watching = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", COLUMNS="80"))
    os.close(theirs)
    shown = read_until(ours, b"running")
    assert b"\x1b[?1049h" in shown, "a screen of its own, which a resize does not tear"
    workers.start_worker("--batch-tokens", 30, **faulty(tmp_path))
    last = read_until(ours, b"\x1b[?1049l")
    with contextlib.suppress(OSError):  # the other side is closed
        while more := os.read(ours, 65_536):
            last += more
    assert watching.wait(30) == 0
    os.close(ours)
    stays = last.partition(b"\x1b[?1049l")[2]
    assert b"completed" in stays, "the last look stays where the command was typed"
    assert b"20 of 20 rows" in stays


def test_a_watched_job_is_a_few_lines_in_a_log(workers: Fleet, tmp_path: Path) -> None:
    slow_corpus(tmp_path / "c.jsonl", 50)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    command = [str(BIN / "embed-status"), job, "--redis", workers.url, "--watch"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True)
    assert watching.stdout is not None
    assert "running" in watching.stdout.readline()
    workers.start_worker("--batch-tokens", 30, **faulty(tmp_path))
    rest = watching.stdout.read()
    assert watching.wait(30) == 0
    looks = re.findall(rf"^job {job}  (\w+)", rest, re.MULTILINE)
    assert looks[-1] == "completed"
    assert len(looks) <= 3, "one for each state, and one now and then"
    assert "\x1b" not in rest


def test_watching_all_queues_ends_with_ctrl_c(workers: Fleet) -> None:
    workers.start_worker()
    ours, theirs = pty.openpty()
    command = [str(BIN / "embed-status"), "--redis", workers.url, "--watch"]
    watching = subprocess.Popen(
        command,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm", COLUMNS="200"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it starts with &
    )
    os.close(theirs)
    read_until(ours, b"queue hashing: 1 worker, nothing queued")
    watching.send_signal(signal.SIGINT)
    shown = read_until(ours, b"\x1b[?25h")  # the cursor is back; a full terminal would block the command
    assert watching.wait(30) == 130
    os.close(ours)
    assert b"Traceback" not in shown


def read_until(terminal: int, word: bytes) -> bytes:
    """What a program wrote, until it wrote this."""
    shown = b""
    while word not in shown:
        shown += os.read(terminal, 65_536)
    return shown


def test_scripts_get_one_object_per_look(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 500)
    job = submit(workers, tmp_path / "c.jsonl", tmp_path / "out")
    command = [str(BIN / "embed-status"), job, "--redis", workers.url, "--watch", "--json"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    assert watching.stdout is not None
    looks = [json.loads(watching.stdout.readline())]
    workers.start_worker()
    looks += [json.loads(line) for line in watching.stdout]
    assert watching.wait(30) == 0
    assert (looks[0]["state"], looks[-1]["state"]) == ("running", "completed")
