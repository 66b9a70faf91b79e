"""Texts that kill, hang or break whoever embeds them: real worker processes, started again as by a supervisor."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_engines import faulty, paced

from e2e.harness import (
    Fleet,
    Process,
    assert_exact,
    assert_no_leftovers,
    fleet,
    processes_mentioning,
    read_errors,
    read_manifest,
    read_rows,
    run,
    start_submit,
    wait_until,
)
from embedstream.api.client import Client
from embedstream.errors import RequestError
from embedstream.jobs import JobState, job_id

STALLED = 75


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


@pytest.fixture
def strikes(tmp_path: Path) -> Path:
    """Where the hashing engine counts its faults."""
    folder = tmp_path / "strikes"
    folder.mkdir()
    return folder


def corpus(path: Path, rows: int, faults: dict[int, str]) -> dict[str, str]:
    """A corpus whose texts hold these faults, by row; returns text by id."""
    texts = {f"t{i}": f"text number {i} " + "word " * (i % 9) + faults.get(i, "") for i in range(rows)}
    path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
    return texts


def good(texts: dict[str, str], *bad: int) -> dict[str, str]:
    return {id: text for id, text in texts.items() if id not in {f"t{i}" for i in bad}}


def detach(workers: Fleet, tmp_path: Path) -> str:
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing", "--detach"]
    done = run("embed-submit", *args)
    assert done.returncode == 0, done.stderr
    return job_id("hashing", str(tmp_path / "out"))


def supervise(workers: Fleet, strikes: Path, *args: object, most: int = 12) -> list[int]:
    """Start a worker again and again until it leaves by itself, all work done; how the others ended."""
    ends: list[int] = []
    while len(ends) < most:
        worker = workers.start_worker("--burst", *args, wait=False, **faulty(strikes))
        code = worker.wait(120)
        if code == 0:
            return ends
        ends.append(code)
    raise AssertionError(f"the work is not done after {ends}")


def errors_of(output: Path) -> dict[str, str]:
    return {error["id"]: error["code"] for error in read_errors(output)}


@pytest.mark.holds("Bad rows cost only themselves")
@pytest.mark.parametrize("fault", ["exit", "tokenize-exit", "kill"])
def test_a_text_that_kills_costs_three_workers_and_one_row(
    workers: Fleet, tmp_path: Path, strikes: Path, fault: str
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 3000, {1500: f"[[fault:{fault}]]"})
    job = detach(workers, tmp_path)
    assert len(supervise(workers, strikes, "--lease-seconds", 1)) == 3
    assert workers.broker.state(job) == JobState.COMPLETED
    assert_exact(tmp_path / "out", good(texts, 1500), every=10)
    assert errors_of(tmp_path / "out") == {"t1500": "poison"}
    assert not workers.broker.client.exists(workers.broker.keys.suspect(job))
    shards = read_manifest(tmp_path / "out")["shards"]
    runs = [run for shard in shards for run in shard["blocks"]]
    blocks = [(run["part"], n) for run in runs for n in range(run["first"], run["last"] + 1)]
    assert len(blocks) == len(set(blocks)), "a block was committed twice"


def test_each_further_killer_in_a_block_costs_one_worker_more(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    faults = {3: "[[fault:exit]]", 7: "[[fault:tokenize-exit]]", 40: "[[fault:kill]]"}
    texts = corpus(tmp_path / "c.jsonl", 60, faults)
    detach(workers, tmp_path)
    assert len(supervise(workers, strikes, "--lease-seconds", 1)) == 5
    assert_exact(tmp_path / "out", good(texts, 3, 7, 40))
    assert errors_of(tmp_path / "out") == {"t3": "poison", "t7": "poison", "t40": "poison"}


def submit(workers: Fleet, path: Path, *args: object) -> str:
    output = path.with_suffix(".out")
    done = run("embed-submit", path, "-o", output, "--redis", workers.url, "--model", "hashing", "--detach", *args)
    assert done.returncode == 0, done.stderr
    return job_id("hashing", str(output))


def supervise_without_signs(workers: Fleet, strikes: Path) -> list[int]:
    """As `supervise`, but a dead worker's last sign of life does not count for another 15 seconds."""
    ends: list[int] = []
    while len(ends) < 12:
        worker = workers.start_worker("--burst", "--lease-seconds", 1, wait=False, **faulty(strikes))
        code = worker.wait(120)
        if code == 0:
            return ends
        ends.append(code)
        for record in workers.broker.workers():
            workers.broker.leave(record.name)
    raise AssertionError(f"the work is not done after {ends}")


@pytest.mark.parametrize("fault", ["tokenize-kill", "kill"])
def test_a_prompt_that_kills_costs_three_workers_and_its_own_job(
    workers: Fleet, tmp_path: Path, strikes: Path, fault: str
) -> None:
    texts = corpus(tmp_path / "good.jsonl", 2000, {})
    corpus(tmp_path / "bad.jsonl", 2000, {})
    bad = submit(workers, tmp_path / "bad.jsonl", "--prompt", f"[[fault:{fault}]]")
    good = submit(workers, tmp_path / "good.jsonl", "--prompt", "passage: ")
    assert len(supervise_without_signs(workers, strikes)) == 3
    assert workers.broker.state(bad) == JobState.FAILED
    assert "3 workers died while they ran its prompt" in workers.broker.status(bad).reason
    assert workers.broker.state(good) == JobState.COMPLETED
    assert {row["id"] for row in read_rows(tmp_path / "good.out")} == set(texts)


@pytest.mark.parametrize("fault", ["tokenize-raise", "raise", "memory"])
def test_a_prompt_that_fails_ends_its_job_with_the_reason(
    workers: Fleet, tmp_path: Path, strikes: Path, fault: str
) -> None:
    corpus(tmp_path / "bad.jsonl", 2000, {})
    bad = submit(workers, tmp_path / "bad.jsonl", "--prompt", f"[[fault:{fault}]]")
    assert supervise(workers, strikes) == []
    assert workers.broker.state(bad) == JobState.FAILED
    assert "asked for" in workers.broker.status(bad).reason
    assert "prompt" in workers.broker.status(bad).reason


@pytest.mark.parametrize("fault", ["tokenize-kill", "kill"])
def test_a_request_whose_prompt_kills_costs_two_workers_and_is_answered(
    workers: Fleet, strikes: Path, fault: str
) -> None:
    answers: list[str] = []

    def ask() -> None:
        with Client(workers.url) as client, pytest.raises(RequestError) as refused:
            client.embed(["a"], prompt=f"[[fault:{fault}]]", model="hashing", timeout=60)
        answers.append(str(refused.value))

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(2):
        worker = workers.start_worker("--lease-seconds", 1, wait=False, **faulty(strikes))
        assert worker.wait(60) == -signal.SIGKILL
    workers.start_worker("--lease-seconds", 1, **faulty(strikes))
    asking.join(30)
    assert "2 workers died of this request" in answers[0]
    with Client(workers.url) as client:
        assert client.embed(["a"], model="hashing").shape == (1, 384)


def test_a_text_that_killed_but_once_or_twice_gets_its_vector(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 2000, {700: "[[fault:exit*2]]", 1900: "[[fault:kill*1]]"})
    detach(workers, tmp_path)
    supervise(workers, strikes, "--lease-seconds", 1)
    assert_exact(tmp_path / "out", texts, every=10)
    assert errors_of(tmp_path / "out") == {}


@pytest.mark.holds("Bad rows cost only themselves", "transformers#45491")
def test_bad_texts_that_do_not_kill_cost_only_themselves(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    kinds = {10: "raise", 20: "memory", 30: "nan", 40: "tokenize-raise", 50: "nan*1", 60: "raise*1", 70: "slow"}
    texts = corpus(tmp_path / "c.jsonl", 1000, {row: f"[[fault:{kind}]]" for row, kind in kinds.items()})
    detach(workers, tmp_path)
    assert supervise(workers, strikes) == []
    assert_exact(tmp_path / "out", good(texts, 10, 20, 30, 40))
    assert errors_of(tmp_path / "out") == {
        "t10": "engine_error",
        "t20": "out_of_memory",
        "t30": "not_finite",
        "t40": "tokenizer_error",
    }


@pytest.mark.parametrize("fault", ["hang", "tokenize-hang"])
def test_a_worker_whose_device_hangs_says_so_and_leaves_to_be_started_again(
    workers: Fleet, tmp_path: Path, strikes: Path, fault: str
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 600, {300: f"[[fault:{fault}]]"})
    detach(workers, tmp_path)
    # With leases of ten minutes the others get its blocks only because it hands them over.
    ends = supervise(workers, strikes, "--lease-seconds", 600, "--stall-seconds", 1)
    assert ends == [STALLED] * 3
    assert "no batch came back for 1 s" in (tmp_path / "worker-0.log").read_text()
    assert_exact(tmp_path / "out", good(texts, 300))
    assert errors_of(tmp_path / "out") == {"t300": "poison"}


def test_marveen_783_a_batch_that_takes_longer_than_stall_seconds_by_the_models_own_pace_is_waited_for(
    workers: Fleet, tmp_path: Path
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 30, {})
    detach(workers, tmp_path)
    worker = workers.start_worker("--burst", "--stall-seconds", 1, "--batch-tokens", 200, wait=False, **paced(70))
    assert worker.wait(60) == 0
    assert_exact(tmp_path / "out", texts)
    assert errors_of(tmp_path / "out") == {}
    assert "a batch is slow: it takes more than 1 s (--stall-seconds)" in (tmp_path / "worker-0.log").read_text()


def test_a_worker_whose_device_hangs_in_its_warm_up_is_seen_and_leaves_to_be_started_again(
    workers: Fleet, tmp_path: Path
) -> None:
    slow = paced(1)
    nothing_known = {"EMBEDSTREAM_CACHE_DIR": str(tmp_path / "cache")}  # of earlier starts: they make a warm-up short
    worker = workers.start_worker("--stall-seconds", 0.5, wait=False, **slow, **nothing_known)
    seen = r"worker \S+  starting: warming up for \d+ s"
    wait_until(lambda: re.search(seen, run("embed-status", "--redis", workers.url).stdout), "it to be seen")
    assert worker.wait(60) == STALLED
    assert "still warming up after 5 s" in (tmp_path / "worker-0.log").read_text()
    assert not workers.broker.workers()


def test_a_lost_device_ends_the_worker_and_eats_no_rows(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 2000, {1000: "[[fault:device*1]]"})
    detach(workers, tmp_path)
    assert supervise(workers, strikes, "--lease-seconds", 600) == [STALLED]
    log = (tmp_path / "worker-0.log").read_text()
    assert "device cpu does not work any more" in log
    assert "Traceback" not in log
    assert_exact(tmp_path / "out", texts, every=10)
    assert errors_of(tmp_path / "out") == {}


def test_embedded_mode_starts_its_worker_again_without_waiting_for_leases(tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 3000, {1500: "[[fault:exit]]", 1510: "[[fault:hang*1]]"})
    begun = time.monotonic()
    done = run(
        "embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--json",
        EMBEDSTREAM_STALL_SECONDS="2", **faulty(strikes),
    )  # fmt: skip
    assert time.monotonic() - begun < 55, "it waited for the 60 s lease of its own dead worker"
    assert done.returncode == 3, done.stderr
    output = tmp_path / "c.jsonl.vectors"
    assert_exact(output, good(texts, 1500), every=10)
    assert errors_of(output) == {"t1500": "poison"}
    assert_no_leftovers(output)
    assert not processes_mentioning(str(tmp_path))


def in_the_model(strikes: Path) -> bool:
    return any(path.stat().st_size for path in strikes.iterdir())


def test_what_is_not_done_when_draining_ends_is_handed_back(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 600, {300: "[[fault:hang*1]]"})
    job = detach(workers, tmp_path)
    worker = workers.start_worker("--drain-seconds", 1, "--lease-seconds", 600, **faulty(strikes))
    wait_until(lambda: in_the_model(strikes), "the text that hangs")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    again = workers.broker.sweep("w2", job, 3_600_000, 100)
    assert {claimed.deliveries for claimed in again} == {1}, "handing back looked like a death"
    workers.broker.run(workers.broker.release(again[0].stream, "w2", [claimed.entry for claimed in again]))
    assert supervise(workers, strikes, "--lease-seconds", 600) == []
    assert_exact(tmp_path / "out", texts)


def test_a_second_signal_ends_a_worker_at_once_and_loses_nothing(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 600, {300: "[[fault:hang*1]]"})
    detach(workers, tmp_path)
    worker = workers.start_worker("--drain-seconds", 600, **faulty(strikes))
    wait_until(lambda: in_the_model(strikes), "the text that hangs")
    worker.send_signal(signal.SIGTERM)
    wait_until(lambda: [w for w in workers.broker.workers() if w.state == "draining"], "the worker to drain")
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.5)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 1
    supervise(workers, strikes, "--lease-seconds", 1)
    assert_exact(tmp_path / "out", texts)


def test_cancelling_takes_seconds_keeps_what_is_committed_and_can_be_taken_back(
    workers: Fleet, tmp_path: Path, strikes: Path
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 4000, dict.fromkeys(range(0, 4000, 100), "[[fault:slow]]"))
    job = detach(workers, tmp_path)
    args: list[object] = ["--window-tokens", 2000, "--batch-tokens", 500]
    first = workers.start_worker(*args, **faulty(strikes))
    wait_until(lambda: len(list(strikes.iterdir())) > 5, "some work")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    committed = workers.broker.status(job).rows
    assert 0 < committed < 4000
    workers.start_worker(*args, **faulty(strikes))
    begun = time.monotonic()
    assert run("embed-cancel", job, "--redis", workers.url).returncode == 0
    wait_until(lambda: workers.broker.state(job) == JobState.CANCELLED, "the manifest", 10)
    assert time.monotonic() - begun < 10
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["partial"], manifest["state"]) == (True, "cancelled")
    assert len(read_rows(tmp_path / "out")) == manifest["rows"] >= committed
    done = run(
        "embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"
    )
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts, every=20)
    assert {shard["name"] for shard in manifest["shards"]} <= {
        shard["name"] for shard in read_manifest(tmp_path / "out")["shards"]
    }


def test_whoever_waits_is_told_of_the_lease_of_a_lost_worker(workers: Fleet, tmp_path: Path, strikes: Path) -> None:
    texts = corpus(tmp_path / "c.jsonl", 600, {300: "[[fault:hang*1]]"})
    job = detach(workers, tmp_path)
    lost = workers.start_worker("--lease-seconds", 20, **faulty(strikes))
    wait_until(lambda: in_the_model(strikes), "the text that hangs")
    lost.kill()
    lost.wait()
    workers.start_worker("--lease-seconds", 20, **faulty(strikes))
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", workers.url, "--model", "hashing"]
    waiting = start_submit(*args)
    assert waiting.stderr is not None
    says = "of a lost worker wait for its lease, at most 20 s"
    assert any(says in line for line in iter(waiting.stderr.readline, "")), "it waits in silence"
    assert says in run("embed-status", job, "--redis", workers.url).stdout
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert_exact(tmp_path / "out", texts)


def test_a_worker_stopped_during_a_trial_leaves_no_text_under_suspicion(
    workers: Fleet, tmp_path: Path, strikes: Path
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 30, dict.fromkeys(range(30), "[[fault:slow*2]]"))
    job = detach(workers, tmp_path)
    stream = workers.broker.keys.blocks(job)
    for name in ("dead-1", "dead-2"):
        claimed = workers.broker.claim(name, [job], 10, 0) or workers.broker.sweep(name, job, 0, 10)
        workers.broker.run(workers.broker.release(stream, name, [claimed[0].entry], died=True))
    worker = workers.start_worker("--lease-seconds", 600, **faulty(strikes))
    wait_until(lambda: workers.broker.suspected(job, 0, 0), "a text under suspicion")
    wait_until(lambda: in_the_model(strikes), "a text in the model")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert workers.broker.suspected(job, 0, 0) == ()
    assert supervise(workers, strikes, "--lease-seconds", 600) == []
    assert_exact(tmp_path / "out", texts)


def test_a_fleet_with_killers_and_paused_workers_loses_and_doubles_nothing(
    workers: Fleet, tmp_path: Path, strikes: Path
) -> None:
    texts = corpus(tmp_path / "c.jsonl", 20_000, {4000: "[[fault:kill]]", 9000: "[[fault:exit]]"})
    job = detach(workers, tmp_path)
    args: list[object] = ["--lease-seconds", 1, "--window-tokens", 4000]

    def start() -> Process:
        return workers.start_worker(*args, wait=False, **faulty(strikes))

    crew = [start() for _ in range(3)]
    paused = crew[0]
    wait_until(lambda: workers.broker.status(job).blocks and workers.is_ready(paused), "a worker at work")
    paused.send_signal(signal.SIGSTOP)

    def ended() -> bool:
        crew[:] = [worker if worker.poll() is None else start() for worker in crew]
        return workers.broker.state(job) == JobState.COMPLETED

    wait_until(ended, "the job to end", 100)
    paused.send_signal(signal.SIGCONT)
    paused.send_signal(signal.SIGTERM)
    assert paused.wait(20) == 0
    failed = errors_of(tmp_path / "out")
    assert failed["t4000"] == failed["t9000"] == "poison"
    assert_exact(tmp_path / "out", {id: text for id, text in texts.items() if id not in failed}, every=50)
    assert len(failed) == 2, "a text that kills nobody was blamed"
    assert_no_leftovers(tmp_path / "out")
