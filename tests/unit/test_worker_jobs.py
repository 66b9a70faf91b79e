"""Which jobs a worker takes: those that are not for it are refused, and that is said once."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from embedstream.jobs import JobSpec, JobState
from embedstream.queue.broker import Broker
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs, space_id


class Bench:
    """A queue, a worker's view of its jobs, and a clock that is moved by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.engine = HashingEngine()
        self.broker = Broker(fakeredis.FakeRedis(server=fakeredis.FakeServer()), "q")
        self.jobs = self.worker()

    def worker(self, model: str = "hashing", revision: str | None = None, **given: Any) -> Jobs:
        tokenizer = self.engine.tokenizer()
        return Jobs(
            self.broker,
            "redis://x",
            self.engine,
            EngineOptions(model, revision),
            (str(self.root),),
            lambda _job, _spec, prompt, max_length: tokenizer.prompt_length(prompt, max_length),
            lambda: self.now,
            **given,
        )

    def create(self, **changed: Any) -> str:
        fields = {"queue": "q", "output": str(self.root / "out"), "model": "hashing", "parts": ("p",)} | changed
        spec = JobSpec(**fields)
        self.broker.run(self.broker.create(spec))
        return spec.job

    def taken(self) -> list[str]:
        return [job.id for job in self.jobs.takeable()]


@pytest.fixture
def bench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Bench:
    caplog.set_level(logging.INFO)
    return Bench(tmp_path)


def said(caplog: pytest.LogCaptureFixture, job: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if job in record.getMessage()]


def test_a_fitting_job_is_opened_once_with_all_that_its_blocks_need(bench: Bench) -> None:
    job = bench.create(prompt="passage: ", max_length=7)
    (opened,) = bench.jobs.takeable()
    assert bench.jobs.takeable() == [opened]
    assert (opened.id, opened.prompt, opened.prompt_length, opened.max_length) == (job, "passage: ", 2, 7)
    assert opened.space == space_id(bench.engine.info, opened.spec, "passage: ", 7)
    assert (bench.root / "out").is_dir()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "another/model"}, "another/model"),
        ({"revision": "v2"}, "v2"),
        ({"output": "/somewhere/else"}, "output roots"),
    ],
)
def test_a_job_that_is_not_for_this_worker_is_refused_and_that_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], says: str
) -> None:
    job = bench.create(**changed)
    assert bench.taken() == []
    bench.now += 10 * LOOK_AGAIN_SECONDS
    assert bench.taken() == []
    (message,) = said(caplog, job)
    assert says in message
    assert says in bench.jobs.refused()[job]
    assert not Path("/somewhere/else").exists()


def test_a_job_that_no_worker_of_this_model_could_serve_is_ended_with_the_reason(bench: Bench) -> None:
    job = bench.create(prompt_name="query")
    assert bench.taken() == []
    assert bench.broker.state(job) == JobState.FINALIZING
    assert "query" in bench.broker.status(job).reason


@pytest.mark.holds("One space")
def test_a_job_of_another_space_is_refused(bench: Bench) -> None:
    job = bench.create()
    client: Any = bench.broker.client
    client.hset(bench.broker.keys.job(job), "space", "another")
    assert bench.taken() == []
    assert "another" in bench.jobs.refused()[job]


def test_a_max_length_that_the_model_cannot_serve_is_refused_before_a_block_is_claimed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedstream.errors import ModelError

    class Strict:
        def encode(self, _texts: list[str], max_length: int) -> None:
            raise ModelError(f"max length {max_length}: too short")

    monkeypatch.setattr(bench.engine, "tokenizer", Strict)
    bench.jobs = bench.worker()
    job = bench.create(max_length=1)
    assert bench.taken() == []
    assert bench.jobs.refused() == {job: "max length 1: too short"}


def test_an_output_that_cannot_be_written_is_looked_at_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    (bench.root / "out").write_text("a file in the way")
    job = bench.create()
    for _ in range(3):
        assert bench.taken() == []
        bench.now += LOOK_AGAIN_SECONDS
    assert len(said(caplog, job)) == 1
    (bench.root / "out").unlink()
    assert bench.taken() == [job]
    assert not bench.jobs.refused()


def test_what_a_job_waits_for_is_told_until_it_can_be_worked_on(bench: Bench) -> None:
    job = bench.create()
    (bench.root / "out").touch()  # a file where a folder belongs
    assert bench.taken() == []
    assert list(bench.jobs.waits()) == [job]
    assert bench.jobs.refused_for_good() == {}
    (bench.root / "out").unlink()
    bench.now += LOOK_AGAIN_SECONDS
    assert bench.taken() == [job]
    assert bench.jobs.waits() == {}
    bench.jobs.stuck(job, "the disk is full")
    assert bench.jobs.waits() == {job: "the disk is full"}
    bench.jobs.stuck(job, "")
    assert bench.jobs.waits() == {}


def test_a_refused_job_keeps_nobody_from_others(bench: Bench) -> None:
    bench.create(model="another/model", output=str(bench.root / "a"))
    job = bench.create(output=str(bench.root / "b"))
    assert bench.taken() == [job]


def test_a_job_that_ended_is_forgotten_and_looked_at_anew_when_it_comes_back(bench: Bench) -> None:
    job = bench.create()
    (opened,) = bench.jobs.takeable()
    bench.jobs.refuse(job, "a block cannot be read")
    assert bench.taken() == []
    bench.broker.run(bench.broker.cancel(job))
    assert bench.taken() == []
    assert not bench.jobs.refused()
    bench.broker.client.flushall()
    bench.create()
    assert bench.taken() == [job]
    assert bench.jobs.takeable()[0] is not opened


def test_a_job_made_anew_on_an_emptied_redis_is_another_one_even_if_nobody_looked_between(bench: Bench) -> None:
    bench.create()
    (old,) = bench.jobs.takeable()
    client: Any = bench.broker.client
    client.flushall()
    job = bench.create(prompt="other: ")
    client.zincrby(bench.broker.keys.jobs, 1, job)  # in case both were made in one millisecond
    (new,) = bench.jobs.takeable()
    assert (new.id, new.prompt) == (old.id, "other: ")


def test_another_revision_is_served_by_the_worker_that_has_it(bench: Bench) -> None:
    job = bench.create(revision="v2")
    bench.jobs = bench.worker(revision="v2")
    assert bench.taken() == [job]


def test_a_look_that_redis_cuts_short_leaves_no_job_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bench.create(output=str(bench.root / "a")), bench.create(output=str(bench.root / "b"))
    status = bench.broker.status

    def cut_short(job: str) -> Any:
        if job == sorted([first, second], key=bench.broker.active_jobs().index)[1]:
            raise redis.ConnectionError("gone")
        return status(job)

    with monkeypatch.context() as patched:
        patched.setattr(bench.broker, "status", cut_short)
        with pytest.raises(redis.ConnectionError):
            bench.jobs.takeable()
    bench.broker.client.flushall()
    assert bench.taken() == []
    bench.create(output=str(bench.root / "a"), prompt="another life: ")
    (opened,) = bench.jobs.takeable()
    assert opened.prompt == "another life: "


CARD = "this model's card wants one in front of every text: give it with --prompt 'passage: '"
BEGIN = "recipe: hashing (built in), hashing in float32, normalized, at most "


@pytest.mark.parametrize(
    ("own", "given", "says", "warns"),
    [
        ("", {}, "8,192 tokens (folder), no prompt (none in the folder)", True),
        ("", {"prompt": ""}, "8,192 tokens (folder), no prompt (flag)", False),
        ("", {"prompt": "passage: "}, '8,192 tokens (folder), prompt "passage: " (flag)', False),
        ("", {"role": "query"}, "8,192 tokens (folder), no prompt (none in the folder)", False),
        ("P: ", {}, '8,192 tokens (folder), prompt "P: " (folder)', False),
        ("P: ", {"prompt_name": "passage"}, '8,192 tokens (folder), prompt "P: " (flag)', False),
        ("", {"prompt": "", "max_length": 64}, "64 tokens (flag), no prompt (flag)", False),
    ],
)
def test_fastembed_251_and_uv_scripts_what_is_in_force_or_missing_is_told_before_a_block_is_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, own: str, given: dict[str, Any], says: str, warns: bool
) -> None:
    monkeypatch.setattr(bench.engine, "_info", replace(bench.engine.info, card_prompts={"document": "passage: "}))
    monkeypatch.setattr(bench.engine, "prompt", lambda _role, prompt, _name: own if prompt is None else prompt)
    told: list[dict[str, str]] = []
    bench.jobs = bench.worker(speak=lambda: told.append(bench.jobs.remarks()))
    job = bench.create(**given)
    assert bench.taken() == [job]
    assert bench.jobs.remarks() == told[0]
    first, *more = bench.jobs.remarks()[job].split("\n")
    assert first == BEGIN + says
    assert [CARD in line for line in more] == [True] * warns
