"""One command, nothing set up: the private server, its worker, and what becomes of them when the command is killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from lab_engines import paced

from e2e.harness import (
    assert_contents,
    assert_exact,
    assert_no_leftovers,
    processes_mentioning,
    read_manifest,
    run,
    start_submit,
    wait_until,
    write_corpus,
)
from embedstream.server.connection import connect


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where embedded mode locks: all processes of a run name this folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


PACED = paced(400_000)
"""40,000 rows then take some five seconds: no run ends before it is broken after its first shard."""


def test_one_command_gives_vectors_and_leaves_nothing_running(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 2000)
    done = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    output = tmp_path / "c.jsonl.vectors"
    assert Path(report["output"]) == output
    assert_exact(output, texts, every=5)
    assert_no_leftovers(output)
    assert not processes_mentioning(str(tmp_path))


@pytest.mark.holds("Repeatable")
def test_the_same_command_again_says_that_it_is_done(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 300)
    first = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--json")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c.jsonl.vectors").iterdir()}
    again = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--json")
    assert first.returncode == again.returncode == 0
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c.jsonl.vectors").iterdir()} == before
    assert_contents(tmp_path / "c.jsonl.vectors", tmp_path / "c.jsonl")


def test_another_setting_into_the_same_output_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 300)
    assert run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing").returncode == 0
    other = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--prompt", "query: ")
    assert other.returncode == 2
    assert "prompt" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        (["--prompt-name", "nosuch"], 2, "Error: --prompt-name nosuch: the hashing engine has no prompts"),
        (["--text-field", "body"], 2, 'no field "body"'),
        (["--keep", "textt"], 2, "none of the first 100 rows has textt (--keep): did you mean text?"),
    ],
)
def test_a_job_that_failed_without_a_row_makes_way_for_the_right_command(
    tmp_path: Path, wrong: list[str], code: int, says: str
) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 300)
    command = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing"]
    for _ in range(2):
        failed = run("embed-submit", *command, *wrong)
        assert failed.returncode == code, failed.stderr
        assert says in failed.stdout + failed.stderr
        if code == 2:
            assert not (tmp_path / "out").exists()
        else:
            assert_no_leftovers(tmp_path / "out")
    done = run("embed-submit", *command)
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts)
    assert len(list((tmp_path / "out").glob("part-*"))) == len(read_manifest(tmp_path / "out")["shards"])


@pytest.mark.holds("Repeatable", "clip-retrieval#368", "Daft#7373")
def test_killed_and_run_again_it_goes_on_and_doubles_nothing(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 40_000)
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing", "--json"]
    first = start_submit(*args, **PACED)
    wait_until(lambda: list((tmp_path / "out").glob("part-*.parquet")), "a first shard")
    first.send_signal(signal.SIGKILL)
    first.wait()
    survivors = {path.name for path in (tmp_path / "out").glob("part-*.parquet")}
    assert not (tmp_path / "out" / "_manifest.json").exists(), "it had finished before it was killed"
    again = run("embed-submit", *args)
    assert again.returncode == 0, again.stderr
    assert_exact(tmp_path / "out", texts, every=100)
    assert_no_leftovers(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    listed = {shard["file"] for shard in manifest["shards"]}
    assert survivors <= listed, "a shard was not adopted"
    assert not processes_mentioning(str(tmp_path))


def test_killed_and_run_again_it_goes_on_in_an_output_in_redis(tmp_path: Path, redis_url: str) -> None:
    write_corpus(tmp_path / "c.jsonl", 40_000)
    address = f"{redis_url}?prefix=docs:"
    args = [tmp_path / "c.jsonl", "-o", address, "--model", "hashing", "--json"]
    first = start_submit(*args, **PACED)
    with connect(redis_url) as client:
        wait_until(lambda: client.exists("docs:_shards"), "a first shard")
        first.send_signal(signal.SIGKILL)
        first.wait()
        again = run("embed-submit", *args)
        assert again.returncode == 0, again.stderr
        assert "rows that lay in the output already" in again.stderr
        assert json.loads(again.stdout)["rows"] == 40_000
        assert not client.exists("docs:_shards", "docs:_pending")
    verified = run("embed-verify", address, "--corpus", tmp_path / "c.jsonl")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_an_unfinished_output_that_was_deleted_is_made_from_the_beginning(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 40_000)
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing"]
    first = start_submit(*args, **PACED)
    wait_until(lambda: list((tmp_path / "out").glob("part-*.parquet")), "a first shard")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    shutil.rmtree(tmp_path / "out")
    again = run("embed-submit", *args)
    assert again.returncode == 0, again.stderr
    assert_exact(tmp_path / "out", texts, every=100)


def test_a_second_run_at_the_same_time_is_told_who_holds_the_output(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 100_000)
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing"]
    first = start_submit(*args)
    started = f"embedstream_worker --redis .*EMBEDSTREAM_EMBEDDED={tmp_path / 'out'}"
    wait_until(lambda: re.search(started, "\n".join(processes_mentioning(str(tmp_path)))), "the first run's worker")
    second = run("embed-submit", *args)
    assert second.returncode == 2
    assert str(first.pid) in second.stderr
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err


def test_ctrl_c_stops_everything_and_the_same_command_goes_on(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 40_000)
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing", "--json"]
    first = start_submit(*args, **PACED)
    wait_until(lambda: list((tmp_path / "out").glob("part-*.parquet")), "a first shard")
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert not processes_mentioning(str(tmp_path / "out"))
    again = run("embed-submit", *args)
    assert again.returncode == 0, again.stderr
    assert_exact(tmp_path / "out", texts, every=100)


@pytest.mark.usefixtures("state")
def test_bad_usage_leaves_nothing_half_made(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 3)
    (tmp_path / "empty.jsonl").write_text("")
    refused: list[tuple[list[object], str]] = [
        ([tmp_path / "none.jsonl"], "none.jsonl"),
        ([tmp_path / "empty.jsonl"], "empty"),
        ([tmp_path / "c.jsonl", "--model", "no/such-model-anywhere"], "no/such-model-anywhere"),
        ([tmp_path / "c.jsonl", "-o", "/proc/nothing/here"], "/proc/nothing"),
        ([tmp_path / "c.jsonl", "--redis", "redis://127.0.0.1:1"], "127.0.0.1:1"),
        (["-"], "-o"),
    ]
    for args, says in refused:
        done = run("embed-submit", *args, EMBEDSTREAM_MODEL="hashing")
        assert done.returncode == 2, (args, done.stderr)
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "empty.jsonl"]


@pytest.mark.holds("One space")
def test_vectors_of_another_model_are_never_added_to_a_half_done_dataset(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 40_000)
    args = [tmp_path / "c.jsonl", "-o", tmp_path / "out"]
    first = start_submit(*args, **PACED)
    wait_until(lambda: list((tmp_path / "out").glob("part-*.parquet")), "a first shard")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    other = run("embed-submit", *args)
    assert other.returncode == 1
    assert "space" in other.stderr
    assert "Traceback" not in other.stderr
    assert not processes_mentioning(str(tmp_path))


def test_flags_for_the_worker_reach_the_one_of_this_command(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 3)
    refused = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "--engine", "no-such-engine")
    assert refused.returncode != 0
    assert "Invalid value for '--engine': 'no-such-engine'" in refused.stderr
    chosen = ["--engine", "hashing", "--device", "cpu", "--dtype", "float32", "--no-warmup"]
    done = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", *chosen)
    assert done.returncode == 0, done.stderr
    mixed = run("embed-submit", tmp_path / "c.jsonl", "--redis", "redis://h:1", "--dtype", "float32")
    assert (mixed.returncode, "--dtype: sets this command's own worker" in mixed.stderr) == (2, True)
