"""A worker process among garbage: it lives, the healthy jobs are done, and commands show and remove what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab.worker import BOUND, HOUR_MS, pack

from e2e.harness import MODEL, Fleet, assert_exact, fleet, run, wait_until, write_corpus
from embedstream.jobs import JobSpec, JobState
from embedstream.keys import GROUP, QUEUES
from embedstream.queue.blocks import Entry, encode_block
from embedstream.queue.steps import Code


@pytest.fixture
def made(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


class Vandal:
    """Writes what no program of ours would."""

    def __init__(self, made: Fleet) -> None:
        self.made = made
        self.broker = made.broker
        self.client: Any = made.broker.client

    def job(self, output: str, entries: tuple[Entry, ...] | None = None, **changed: Any) -> str:
        """A job of two blocks, which is submitted wholly."""
        names = {"queue": MODEL, "model": MODEL, "parts": ("records",), "output": str(self.made.root / output)}
        spec = JobSpec(**{**names, **changed})
        broker, blocks = self.broker, [encode_block(block) for block in pack(["a", "b"], 1)]
        assert broker.run(broker.create(spec)).code is Code.CREATED
        for entry in entries or blocks:
            assert broker.run(broker.submit(spec.job, entry, BOUND)).code is Code.OK
        assert broker.run(broker.seal(spec.job, 0, len(entries or blocks))).code is Code.OK
        return spec.job

    def paused_job(self, output: str) -> str:
        """One that a worker has opened, and to which nothing comes at present."""
        job = self.job(output)
        wait_until(lambda: self.broker.status(job).state.ended, "the job to end")
        self.client.hset(self.broker.keys.job(job), mapping={"state": "submitting", "ended": ""})
        self.client.zadd(self.broker.keys.jobs, {job: 1})
        return job

    def another_type(self, key: str) -> None:
        self.client.delete(key)
        self.client.set(key, "garbage")

    def delivered(self, job: str, count: int) -> None:
        """All blocks of a job are in the hands of a dead worker, after so many deliveries."""
        stream = self.broker.keys.blocks(job)
        self.client.xreadgroup(GROUP, "gone", {stream: ">"})
        for entry, _ in self.client.xrange(stream):
            self.client.xclaim(stream, GROUP, "gone", 0, [entry], idle=HOUR_MS, retrycount=count, justid=True)


def odd_offsets() -> tuple[Entry, ...]:
    """A block in whose metadata one number is larger by one: the offsets of a column end in the middle of a number."""
    (block,) = pack(["a", "b", "c"], 3)
    entry = encode_block(block)
    offsets = entry.body.index((16).to_bytes(8, "little"))
    return (msgspec.structs.replace(entry, body=entry.body[:offsets] + b"\x11" + entry.body[offsets + 1 :]),)


def damaged_jobs(vandal: Vandal) -> list[str]:
    """Jobs of which each has another record, key or spec damaged."""
    keys, client, root = vandal.broker.keys, vandal.client, vandal.made.root
    (root / "loop").symlink_to(root / "loop")
    found = []

    def damage(name: str, how: Callable[[str], object], **changed: Any) -> None:
        job = vandal.job(name, **changed)
        how(job)
        found.append(job)

    client.delete(keys.jobs)  # none is taken before it is damaged
    damage("model-nul", lambda _: None, model="a\0b")
    damage("model-loop", lambda _: None, model=str(root / "loop"))
    damage("output-" + "y" * 300, lambda _: None)
    damage("max-length", lambda _: None, max_length=2**63)
    damage("created", lambda job: client.hset(keys.job(job), "created", "1" * 400))
    damage("state", lambda job: client.hset(keys.job(job), "state", b"\xff"))
    damage("hash", lambda job: vandal.another_type(keys.job(job)))
    damage("blocks", lambda job: vandal.another_type(keys.blocks(job)))
    damage("done", lambda job: client.delete(keys.done(job, 0)) or client.lpush(keys.done(job, 0), "garbage"))
    damage("shards", lambda job: vandal.another_type(keys.shards(job)))
    damage("verdict", lambda job: vandal.broker.run(vandal.broker.cancel(job)))
    client.hset(keys.job(found[-1]), "verdict", "nonsense")
    for at, job in enumerate(found):
        client.zadd(keys.jobs, {job: at})
    return found


def test_a_worker_lives_among_garbage_and_the_healthy_jobs_are_done(made: Fleet, tmp_path: Path) -> None:
    vandal, worker = Vandal(made), made.start_worker()
    broker, client, keys = vandal.broker, vandal.client, vandal.broker.keys
    paused = vandal.paused_job("paused")
    damaged = damaged_jobs(vandal)
    client.hset(keys.job(paused), "state", "nonsense")
    noted = [vandal.job(f"noted-{at}") for at in range(2)]
    for job, note, count in zip(noted, ("x,y", "99999,-5"), (5, 2**63 - 1), strict=True):
        client.hset(keys.suspect(job), mapping={"0:0": note, "0:1": note})
        vandal.delivered(job, count)
    no_block = vandal.job("no-block", odd_offsets())
    for key in (keys.jobs, keys.finalize, keys.workers, QUEUES):
        client.zadd(key, {b"\xff": 1})
    client.set(keys.worker("evil"), "garbage")
    client.zadd(keys.workers, {"evil": 1e18})
    for key in (keys.pace, keys.bytes, keys.interactive):
        client.delete(key)
        client.sadd(key, "garbage")

    def submits(name: str) -> None:
        texts = write_corpus(tmp_path / f"{name}.jsonl", 300)
        done = run(
            "embed-submit", tmp_path / f"{name}.jsonl", "--model", MODEL, "--redis", made.url, "-o", tmp_path / name
        )
        assert done.returncode == 0, done.stderr
        assert_exact(tmp_path / name, texts)

    submits("first")
    other = made.start_worker()
    submits("second")
    for job in noted:
        wait_until(lambda job=job: broker.status(job).state is JobState.COMPLETED, "a job with a senseless note")  # type: ignore[misc]
    assert broker.status(no_block).state is JobState.FAILED
    assert "cannot be read" in broker.status(no_block).reason
    client.delete(keys.workers)
    client.set(keys.workers, "garbage")
    submits("third")
    assert (worker.poll(), other.poll()) == (None, None)
    client.delete(keys.workers)

    log = (tmp_path / "worker-0.log").read_text()
    assert "Traceback" not in log
    for job in damaged:
        said = [line for line in log.splitlines() if f"job {job} is not for this worker" in line]
        # Once for each life: that the jobs are listed anew, in another order, looks like a second one.
        assert len(said) <= 2, "a worker repeats itself"

    wait_until(lambda: run("embed-worker", "--model", MODEL, "--redis", made.url, "--check").returncode == 0, "--check")
    shown = run("embed-status", "--redis", made.url)
    assert (shown.returncode, "Traceback" in shown.stderr) == (0, False)
    assert "first" in shown.stdout
    assert f"{keys.worker('evil')} is damaged" in shown.stderr or "evil" not in shown.stderr
    unreadable = json.loads(run("embed-status", "--redis", made.url, "--json").stdout)["queues"][0]["unreadable_jobs"]
    assert set(unreadable) <= {*damaged, paused}
    for job, why in unreadable.items():
        assert f"embed-cancel {job} removes it" in why
    for job in (*damaged, paused):
        ended = run("embed-cancel", job, "--redis", made.url)
        assert ended.returncode == 0, ended.stderr
    wait_until(lambda: "unreadable" not in run("embed-status", "--redis", made.url).stdout, "nothing is unreadable")
