"""Redis goes back to an earlier copy of its file, in which a finished job is unfinished: its manifest outranks that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.dataset import Dataset, make_content, make_spec

from e2e.harness import fleet, read_manifest, run, wait_until, write_corpus
from embedstream.dataset.manifest import decode_manifest, manifest_spec
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec, JobState
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream_coordinator.expiring import expire_queue


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    write_corpus(folder / "corpus.jsonl", 50)
    assert run("embed-submit", folder / "corpus.jsonl", "--model", "hashing").returncode == 0
    return folder / "corpus.jsonl.vectors"


def the_same_command(url: str, dataset: Path) -> None:
    again = run("embed-submit", dataset.with_suffix(""), "--model", "hashing", "--redis", url)
    assert (again.returncode, "is finished already" in again.stdout) == (0, True)


def the_same_command_server_side(url: str, dataset: Path) -> None:
    again = run("embed-submit", dataset.with_suffix(""), "--model", "hashing", "--redis", url, "--server-side")
    assert (again.returncode, "is finished already" in again.stdout) == (0, True)


def a_worker(url: str, dataset: Path) -> None:
    client = connect(url)
    with fleet(url, dataset.parent) as workers:
        workers.start_worker()
        wait_until(lambda: not unexpiring(client, spec_of(dataset).job), "the worker ends the job")


def a_coordinator(url: str, dataset: Path) -> None:
    spec = spec_of(dataset)
    expire_queue(Broker(connect(url), spec.queue), lambda spec: open_sink(spec.output, spec, url))


def whoever_cancels_it(url: str, dataset: Path) -> None:
    spec = spec_of(dataset)
    broker = Broker(connect(url), spec.queue)
    broker.run(broker.cancel(spec.job))
    assert finalize_job(broker, spec.job, lambda spec: open_sink(spec.output, spec, url))


def spec_of(dataset: Path) -> JobSpec:
    return manifest_spec(decode_manifest((dataset / "_manifest.json").read_bytes(), str(dataset)))


def unexpiring(client: object, job: str) -> list[str]:
    """Keys of a job that would stay forever."""
    ask: object = client
    return [key.decode() for key in ask.scan_iter(match=f"*{job}*") if ask.ttl(key) == -1]  # type: ignore[attr-defined]


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "ends",
    [the_same_command, the_same_command_server_side, a_worker, a_coordinator, whoever_cancels_it],
    ids=lambda ends: ends.__name__,
)
def test_a_finished_job_ends_in_redis_too_and_its_dataset_stays_as_it_is(
    redis_url: str, dataset: Path, ends: Callable[[str, Path], None]
) -> None:
    spec, before = spec_of(dataset), contents(dataset)
    broker = Broker(connect(redis_url), spec.queue)
    broker.run(broker.create(spec))
    assert unexpiring(connect(redis_url), spec.job), "the job is unfinished"
    ends(redis_url, dataset)
    assert unexpiring(connect(redis_url), spec.job) == []
    assert (broker.state(spec.job), broker.active_jobs(), broker.outbox()) == (JobState.COMPLETED, [], [])
    assert contents(dataset) == before
    assert read_manifest(dataset)["state"] == "completed"


def test_what_is_committed_after_the_manifest_stands_is_removed_and_not_listed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    spec = make_spec(output=str(tmp_path / "out"))
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.write(make_content(spec, "one", [(0, 0)]))
    manifest, before = dataset.end(), contents(tmp_path / "out")
    dataset.write(make_content(spec, "again", [(0, 0)]))
    assert dataset.end(JobState.CANCELLED) == manifest
    assert contents(tmp_path / "out") == before


def test_a_finalizer_that_comes_late_leaves_a_newer_manifest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    spec = make_spec(output=str(tmp_path / "out"))
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.write(make_content(spec, "one", [(0, 0)]))
    older = dataset.end()
    # As a compaction would, after the late one has looked.
    newer = b'{"newer": true}'
    (tmp_path / "out" / "_manifest.json").write_bytes(newer)
    monkeypatch.setattr(dataset.sink, "read_manifest", lambda: older)
    assert dataset.end() == older
    assert (tmp_path / "out" / "_manifest.json").read_bytes() == newer
