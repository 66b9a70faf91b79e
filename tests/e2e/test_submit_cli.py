"""What embed-submit, embed-status and embed-cancel say and how they end. Workers are played by `lab.mini_worker`."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import RedisServer
from lab.mini_worker import MiniWorker
from lab.redis_servers import own_server

from e2e.harness import (
    BIN,
    assert_contents,
    environment,
    read_errors,
    read_manifest,
    read_rows,
    run,
    start_submit,
    wait_until,
)
from embedstream.cli.commands import ECHO_SECONDS
from embedstream.jobs import FORMAT_VERSION, job_id
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect


@pytest.fixture
def queue() -> str:
    return f"cli-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return redis_server.url


def corpus(folder: Path, rows: int = 50, bad: int = 0, name: str = "c.jsonl") -> Path:
    path = folder / name
    lines = [json.dumps({"id": f"{name}{i}", "text": f"text {i}"}) for i in range(rows)] + ["{broken"] * bad
    path.write_text("\n".join(lines) + "\n")
    return path


def fleet_args(url: str, queue: str) -> list[object]:
    return ["--redis", url, "--queue", queue, "--model", "mini"]


@pytest.mark.parametrize("command", ["embed-submit", "embed-status", "embed-cancel"])
def test_help_is_shown_without_loading_a_model_library(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "--redis" in done.stdout


def test_defaults_and_exit_codes_are_in_the_help() -> None:
    text = run("embed-submit", "--help").stdout
    assert "all-MiniLM-L6-v2" in text
    assert "Exit codes" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "CORPUS"),
        (["none.jsonl"], "none.jsonl"),
        (["empty.jsonl"], "empty.jsonl"),
        (["c.txt"], "c.txt: the first 2 rows are all refused: line 1: "),
        (["c.txt", "empty.jsonl", "-o", "out"], "a corpus has one JSON object per line: nothing was started"),
        (["c.jsonl", "--text-field", "body"], 'no field "body"'),
        (["c.jsonl", "c.jsonl", "-o", "out"], "twice"),
        (["c.jsonl", "d.jsonl"], "-o"),
        (["-"], "-o"),
        (["c.jsonl", "--max-errors", "many"], "--max-errors many"),
        (["c.jsonl", "--prompt", "x", "--prompt-name", "query"], "exclude"),
        (["c.jsonl", "--keep", "text"], "--keep text"),
        (["c.jsonl", "--model", ""], "--model"),
        (["c.jsonl", "--revision", "x"], "--revision x"),
        (["c.jsonl", "--detach"], "--detach needs --redis"),
        (["c.jsonl", "--redis", "redis://127.0.0.1:1"], "127.0.0.1:1"),
        (["c.jsonl", "--redis", "http://127.0.0.1"], "redis://"),
        (["c.jsonl", "--redis", "redis://me:secret@127.0.0.1:1"], "cannot be reached"),
        (["c.jsonl", "-o", "s3://bucket/x"], "s3:"),
        (["c.jsonl", "-o", "redis:?prefix=docs:"], "--redis"),
        (["c.jsonl", "-o", "/proc/nothing/here"], "/proc/nothing"),
        (["c.jsonl", "-o", "d.jsonl"], "d.jsonl"),
        (["c.jsonl", "-o", "full"], "full"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, args: list[str], says: str
) -> None:
    corpus(tmp_path)
    corpus(tmp_path, name="d.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "c.txt").write_text("hello\nworld\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    done = subprocess.run(
        [str(BIN / "embed-submit"), *args],
        cwd=tmp_path,
        env=environment(EMBEDSTREAM_MODEL="hashing"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_report_is_one_json_object(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue):
        done = run("embed-submit", corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        *("job", "state", "rows", "failed", "truncated", "duplicates", "tokens"),
        *("padding", "seconds", "output", "model", "outputs"),
        *("reused", "embedded", "generation", "added", "changed", "removed"),
    }
    assert (report["state"], report["rows"], report["outputs"][0]["dim"]) == ("completed", 50, 2)
    manifest = read_manifest(tmp_path / "out")
    assert report["seconds"] == pytest.approx(manifest["ended"] - manifest["created"], abs=0.001)


@pytest.mark.parametrize(
    ("bad", "good", "args", "code", "state"),
    [
        (0, 5, [], 0, "completed"),
        (2, 5, [], 3, "completed"),
        (2, 5, ["--max-errors", "2"], 0, "completed"),
        (2, 5, ["--max-errors", "1"], 1, "failed"),
        (2, 5, ["--max-errors", "50%"], 0, "completed"),
        (2, 5, ["--max-errors", "10%"], 1, "failed"),
    ],
)
def test_exit_codes_say_how_the_job_ended_and_the_same_command_says_it_again(
    tmp_path: Path, url: str, queue: str, bad: int, good: int, args: list[str], code: int, state: str
) -> None:
    command = [corpus(tmp_path, good, bad), "-o", tmp_path / "out", *fleet_args(url, queue), "--json", *args]
    with MiniWorker(url, queue):
        for _ in range(2):
            done = run("embed-submit", *command)
            assert done.returncode == code, done.stderr
            assert json.loads(done.stdout)["state"] == state
            assert json.loads(done.stdout)["rows"] in (good, 0)
            assert "Traceback" not in done.stderr
    watched = run("embed-status", job_id(queue, str(tmp_path / "out")), "--redis", url, "--watch")
    assert watched.returncode == code, watched.stderr


def test_too_many_errors_are_the_reason_from_the_first_run_on(tmp_path: Path, url: str, queue: str) -> None:
    command = [corpus(tmp_path, 5, 2), "-o", tmp_path / "out", *fleet_args(url, queue), "--max-errors", "1"]
    with MiniWorker(url, queue):
        for _ in range(2):
            done = run("embed-submit", *command)
            assert done.returncode == 1
            assert "2 rows failed, more than the 1 that --max-errors allows" in done.stdout
            assert f"errors:  2 rows (2 invalid_json), listed in {tmp_path / 'out' / '_errors.jsonl'}" in done.stdout


def test_a_finished_output_is_judged_by_the_bound_of_this_command(tmp_path: Path, url: str, queue: str) -> None:
    command = [corpus(tmp_path, 5, 2), "-o", tmp_path / "out", *fleet_args(url, queue)]
    with MiniWorker(url, queue):
        codes = [run("embed-submit", *command, *more).returncode for more in ([], ["--max-errors", "2"])]
        codes.append(run("embed-submit", *command, "--max-errors", "1").returncode)
    assert codes == [3, 0, 3]


def test_refused_rows_are_shown_three_of_a_kind_and_then_counted(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue):
        done = run("embed-submit", corpus(tmp_path, 5, 10), "-o", tmp_path / "out", *fleet_args(url, queue))
    assert done.returncode == 3
    assert done.stderr.count("c.jsonl:") == 3
    assert "c.jsonl:6: " in done.stderr
    assert "7 more rows refused: invalid_json (10 in all" in done.stderr
    assert len(read_errors(tmp_path / "out")) == 10
    assert "errors:  10 rows (10 invalid_json), listed in" in done.stdout


def test_a_finished_output_is_not_touched_and_needs_no_server(tmp_path: Path, url: str, queue: str) -> None:
    command = [corpus(tmp_path), "-o", tmp_path / "out", "--queue", queue, "--model", "mini"]
    with MiniWorker(url, queue):
        assert run("embed-submit", *command, "--redis", url).returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for more in (["--redis", url], ["--redis", "redis://127.0.0.1:1"], []):
        done = run("embed-submit", *command, *more)
        assert done.returncode == 0, done.stderr
        assert "finished already" in done.stdout
    wrong = run("embed-submit", *command, "--redis", "localhost:6379")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "use redis://host:6379/0" in wrong.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_finished_output_that_was_deleted_is_made_again(tmp_path: Path, url: str, queue: str) -> None:
    command = [corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue)]
    with MiniWorker(url, queue):
        assert run("embed-submit", *command).returncode == 0
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        done = run("embed-submit", *command)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out")["rows"] == 50


def test_a_submit_without_a_worker_names_the_command_and_the_queues_that_have_one(
    tmp_path: Path, url: str, queue: str
) -> None:
    with MiniWorker(url, f"{queue}-other"):
        submit = start_submit(corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue), "--json")
        assert submit.stderr is not None
        said = next(line for line in submit.stderr if "waiting for a worker" in line)
        assert f"embed-worker --model mini --queue {queue} --redis {url}" in said
        assert f"{queue}-other" in said
        with MiniWorker(url, queue):
            out, err = submit.communicate(timeout=60)
    assert submit.returncode == 0, err
    assert json.loads(out)["rows"] == 50


def test_a_printed_command_can_be_pasted_whatever_the_password(tmp_path: Path, url: str, queue: str) -> None:
    secret = f"{url}?username=default&password=hunter2"
    command = [corpus(tmp_path), "-o", tmp_path / "out", "--queue", queue, "--model", "mini", "--detach"]
    job = job_id(queue, str(tmp_path / "out"))
    for args, variable, later in [(["--redis", url], "", ""), ([], secret, secret), (["--redis", secret], "", secret)]:
        said = run("embed-submit", *command, *args, EMBEDSTREAM_REDIS_URL=variable).stderr
        (printed,) = re.findall(rf"`(embed-status {job}.*?)`", said)
        assert "***" not in printed
        assert "hunter2" not in said
        pasted = run(*shlex.split(printed), EMBEDSTREAM_REDIS_URL=later)
        assert pasted.returncode == 0, pasted.stderr
        assert job in pasted.stdout
    Broker(connect(url), queue).run(Broker(connect(url), queue).cancel(job))


def test_ctrl_c_detaches_from_a_fleet_and_says_how_to_look_again(tmp_path: Path, url: str, queue: str) -> None:
    submit = start_submit(corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue))
    broker, job = Broker(connect(url), queue), job_id(queue, str(tmp_path / "out"))
    wait_until(lambda: broker.state(job) == "running", "the job's submission")
    submit.send_signal(signal.SIGINT)
    _, err = submit.communicate(timeout=30)
    assert submit.returncode == 130
    assert f"embed-status {job} --redis {url}" in err
    assert "Traceback" not in err
    assert broker.state(job) == "running"
    broker.run(broker.cancel(job))


def test_signals_that_rain_on_an_ending_command_change_nothing(tmp_path: Path, url: str, queue: str) -> None:
    submit = start_submit(corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue))
    broker, job = Broker(connect(url), queue), job_id(queue, str(tmp_path / "out"))
    wait_until(lambda: broker.state(job) == "running", "the job's submission")
    end = time.monotonic() + 30
    while submit.poll() is None:
        assert time.monotonic() < end, "it does not end"
        for number in (signal.SIGINT, signal.SIGTERM):
            submit.send_signal(number)
    _, err = submit.communicate()
    assert submit.returncode == 130, err
    assert "Traceback" not in err
    broker.run(broker.cancel(job))


def test_a_second_ctrl_c_does_not_wait_for_a_redis_that_hangs(tmp_path: Path, queue: str) -> None:
    with own_server() as server:
        submit = start_submit(corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(server.url, queue))
        broker, job = Broker(connect(server.url), queue), job_id(queue, str(tmp_path / "out"))
        wait_until(lambda: broker.state(job) == "running", "the job's submission")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            submit.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                submit.wait(2 * ECHO_SECONDS)
            submit.send_signal(signal.SIGINT)
            _, err = submit.communicate(timeout=3)
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert submit.returncode == 130, err
    assert "Traceback" not in err


def test_a_cancelled_job_ends_the_one_who_waits_with_4(tmp_path: Path, url: str, queue: str) -> None:
    submit = start_submit(corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue), "--json")
    broker, job = Broker(connect(url), queue), job_id(queue, str(tmp_path / "out"))
    wait_until(lambda: broker.state(job) == "running", "the job's submission")
    cancelled = run("embed-cancel", job, "--redis", url)
    assert cancelled.returncode == 0, cancelled.stderr
    out, err = submit.communicate(timeout=30)
    assert submit.returncode == 4, err
    assert json.loads(out)["state"] == "cancelled"
    assert run("embed-status", job, "--redis", url, "--watch").returncode == 4
    assert run("embed-status", job, "--redis", url).returncode == 0, "one look is not the job's end"
    assert run("embed-cancel", job, "--redis", url).stdout == f"job {job} is cancelled already\n"
    assert read_manifest(tmp_path / "out")["partial"]


def test_compressed_and_piped_corpora_are_read(tmp_path: Path, url: str, queue: str) -> None:
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus(tmp_path).read_bytes()))
    with MiniWorker(url, queue):
        assert run("embed-submit", packed, "-o", tmp_path / "gz", *fleet_args(url, queue)).returncode == 0
        piped = subprocess.run(
            [str(BIN / "embed-submit"), "-", "-o", str(tmp_path / "piped"), *map(str, fleet_args(url, queue))],
            input=corpus(tmp_path).read_bytes(),
            env=environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert piped.returncode == 0, piped.stderr.decode()
    assert read_manifest(tmp_path / "gz")["rows"] == read_manifest(tmp_path / "piped")["rows"] == 50
    assert_contents(tmp_path / "gz", packed)
    [part] = read_manifest(tmp_path / "piped")["parts"]
    assert (part["name"], part["bytes"]) == ("-", None)
    assert part["sha256"] == hashlib.sha256(corpus(tmp_path).read_bytes()).hexdigest()


def test_a_pipe_that_nobody_writes_into_is_said_to_be_waited_for(tmp_path: Path, url: str, queue: str) -> None:
    pipe = tmp_path / "p.jsonl"
    os.mkfifo(pipe)
    with MiniWorker(url, queue):
        submit = start_submit(pipe, "-o", tmp_path / "out", *fleet_args(url, queue), "--json")
        assert submit.stderr is not None
        assert submit.stderr.readline() == f"{pipe}: waiting for its first record\n"
        pipe.write_text(corpus(tmp_path).read_text())
        out, err = submit.communicate(timeout=60)
    assert submit.returncode == 0, err
    assert json.loads(out)["rows"] == 50


def test_flags_have_environment_variables(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue):
        done = run(
            *("embed-submit", corpus(tmp_path)),
            EMBEDSTREAM_REDIS_URL=url,
            EMBEDSTREAM_QUEUE=queue,
            EMBEDSTREAM_MODEL="mini",
            EMBEDSTREAM_OUTPUT=str(tmp_path / "out"),
            EMBEDSTREAM_JSON="1",
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")


def test_quiet_says_nothing_on_standard_error(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue):
        done = run(
            *("embed-submit", corpus(tmp_path, 5, 5), "-o", tmp_path / "out"), *fleet_args(url, queue), "--quiet"
        )
    assert (done.returncode, done.stderr) == (3, "")


def test_status_shows_jobs_queues_and_workers(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue) as worker:
        run("embed-submit", corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue))
        job = job_id(queue, str(tmp_path / "out"))
        listing = run("embed-status", "--redis", url)
        assert listing.returncode == 0, listing.stderr
        assert f"queue {queue}: 1 worker" in listing.stdout
        assert worker.record.name in listing.stdout
        assert job in listing.stdout
        one = run("embed-status", job, "--redis", url, "--watch")
        assert "completed" in one.stdout
        assert "50 of 50 rows" in one.stdout
        as_json = json.loads(run("embed-status", job, "--redis", url, "--json").stdout)
        assert (as_json["state"], as_json["rows"]) == ("completed", 50)
        queues = json.loads(run("embed-status", "--redis", url, "--json").stdout)["queues"]
        assert [q["jobs"][0]["job"] for q in queues if q["queue"] == queue] == [job]


def test_one_queue_can_be_looked_at_and_a_job_sought_there(tmp_path: Path, url: str, queue: str) -> None:
    job = job_id(queue, str(tmp_path / "out"))
    run("embed-submit", corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue), "--detach")
    with MiniWorker(url, f"{queue}-other"):
        listed = json.loads(run("embed-status", "--redis", url, "--queue", queue, "--json").stdout)["queues"]
        assert [each["queue"] for each in listed] == [queue]
        nothing = run("embed-status", "--redis", url, "--queue", "no-such")
        assert nothing.returncode == 0
        assert "no queue no-such: neither job nor worker was there in the last 30 days; there are" in nothing.stdout
        assert f"{queue}-other" in nothing.stdout
        for command in ("embed-status", "embed-cancel"):
            elsewhere = run(command, job, "--redis", url, "--queue", f"{queue}-other")
            assert elsewhere.returncode == 2
            assert f"no job {job} on queue {queue}-other (without --queue" in elsewhere.stderr
    assert run("embed-cancel", job, "--redis", url, EMBEDSTREAM_QUEUE=queue).returncode == 0
    assert (
        f"job {job}  finalizing (cancelled)  0 of 50"
        in run("embed-status", job, "--redis", url, EMBEDSTREAM_QUEUE=queue).stdout
    )


def test_a_job_of_another_version_is_listed_by_its_id_and_can_be_cancelled(
    tmp_path: Path, url: str, queue: str
) -> None:
    job, broker = job_id(queue, str(tmp_path / "out")), Broker(connect(url), queue)
    run("embed-submit", corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue), "--detach")
    newer = FORMAT_VERSION + 1
    broker.client.hset(broker.keys.job(job), "spec", json.dumps({"v": newer}))
    why = f"job spec has format version {newer}, this embedstream reads {FORMAT_VERSION}: upgrade it"
    listing = run("embed-status", "--redis", url, "--queue", queue)
    assert f"  job {job}  unreadable: {why}\n" in listing.stdout
    assert "1 block queued (0 in workers' hands), the oldest for" in listing.stdout
    assert "1 block that no live worker accepts\n" in listing.stdout
    (looked,) = json.loads(run("embed-status", "--redis", url, "--queue", queue, "--json").stdout)["queues"]
    assert (looked["unreadable_jobs"], looked["refused_blocks"], looked["drain_seconds"]) == ({job: why}, 1, 0)
    one = run("embed-status", job, "--redis", url)
    assert (one.returncode, one.stderr) == (2, f"Error: job {job} on queue {queue}: {why}\n")
    assert "is cancelled" in run("embed-cancel", job, "--redis", url).stdout
    assert broker.backlog(job) == 0


@pytest.mark.parametrize("command", ["embed-status", "embed-cancel"])
def test_an_unknown_job_or_server_is_one_sentence(command: str, url: str) -> None:
    for args, says in [
        (["0000000000000000", "--redis", url], "no job 0000000000000000"),
        (["0000000000000000", "--redis", "redis://127.0.0.1:1"], "cannot be reached"),
        (["0000000000000000"], "EMBEDSTREAM_REDIS_URL"),
    ]:
        done = run(command, *args)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_without_model_libraries_the_command_says_what_to_install(tmp_path: Path) -> None:
    block = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'embed-submit'; "
    code = block + "from embedstream_producer.submit_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus(tmp_path))],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "pip install 'embedstream[local]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_doris_1594_an_empty_file_among_others_is_said_once_and_verified(tmp_path: Path, url: str, queue: str) -> None:
    empty = tmp_path / "_SUCCESS.jsonl"
    empty.write_bytes(b"")
    command = [empty, corpus(tmp_path), "-o", tmp_path / "out", *fleet_args(url, queue)]
    with MiniWorker(url, queue):
        done = run("embed-submit", *command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no records: it counts as a part of 0 rows") == 1
    assert [part["bytes"] for part in read_manifest(tmp_path / "out")["parts"]] == [
        0,
        (tmp_path / "c.jsonl").stat().st_size,
    ]
    assert "finished already" in run("embed-submit", *command).stdout


def test_a_script_gets_the_jobs_id_of_a_command_that_leaves(tmp_path: Path, url: str, queue: str) -> None:
    with MiniWorker(url, queue):
        done = run("embed-submit", corpus(tmp_path, 5), "-o", tmp_path / "out", *fleet_args(url, queue), "--detach")
        assert (done.returncode, done.stdout.strip()) == (0, job_id(queue, str(tmp_path / "out")))
        assert run("embed-status", done.stdout.strip(), "--redis", url).returncode == 0


def test_a_folder_of_texts_a_csv_and_an_array_are_embedded_and_verified(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "a.md").write_text("# One\n\na text")
    (tmp_path / "docs" / "deep" / "b.md").write_text("another text")
    (tmp_path / "c.csv").write_text('id,text,lang\n1,"a text, quoted",en\n2,text,\n')
    (tmp_path / "c.json").write_text('[{"id": "x", "text": "the last"}]')
    sources = [tmp_path / "docs", tmp_path / "c.csv", tmp_path / "c.json"]
    command = ["embed-submit", *map(str, sources), "-o", str(tmp_path / "out"), "--model", "hashing"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row["text"] for row in read_rows(tmp_path / "out")}
    assert rows == {
        "a.md": "# One\n\na text",
        "deep/b.md": "another text",
        "1": "a text, quoted",
        "2": "text",
        "x": "the last",
    }
    assert all(part["sha256"] for part in read_manifest(tmp_path / "out")["parts"])
    assert "nothing was done" in run(*command).stdout
    verified = run("embed-verify", tmp_path / "out", *(arg for source in sources for arg in ("--corpus", source)))
    assert verified.returncode == 0, verified.stdout
    (tmp_path / "docs" / "deep" / "b.md").write_text("another test")
    assert run(*command).returncode == 2
