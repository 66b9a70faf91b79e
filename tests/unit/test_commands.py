"""How a command ends when nobody listens, nobody waits, or nothing can be said any more; and its live line."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from embedstream.cli.commands import run
from embedstream.errors import UsageError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.queue.workers import InHand, Rate, WorkerRecord, in_hand_of
from embedstream.settings import Settings
from embedstream_producer.progress import Progress, with_in_hand
from embedstream_producer.report import errors_of
from embedstream_worker.cli import worker

STATUS = JobStatus(
    job="0123456789abcdef", state=JobState.RUNNING,
    spec=JobSpec(queue="q", output="/out", model="m", parts=("c.jsonl",)),
    created=0.0, ended=None, now=100.0, pushed=0.0, committed=0.0, submitted=300_000, rows=299_000, failed=500,
    skipped=0, truncated=0, tokens=10_000_000, padded=10_000_000, blocks=1200, done=1100, queued_bytes=0, sealed=True,
    space="", max_errors="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("no such thing: use another"), 2, "Error: no such thing: use another"),
        (click.UsageError("what?"), 2, "what?"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "standard output cannot be written: No space left"),
    ],
)
def test_every_ending_has_its_code_and_one_sentence(
    raised: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr("sys.argv", ["embed-test"])
    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == code
    assert says in capsys.readouterr().err


COMMANDS = {
    "embed-submit": ("embedstream_producer.submit_cli", ["c.jsonl"]),
    "embed-status": ("embedstream_producer.status_cli", ["--redis", "redis://127.0.0.1:1"]),
    "embed-cancel": ("embedstream_producer.cancel_cli", ["0123456789abcdef", "--redis", "redis://127.0.0.1:1"]),
    "embed-verify": ("embedstream_producer.verify_cli", ["dataset"]),
    "embed-worker": ("embedstream_worker.cli", ["--model", "hashing", "--redis", "redis://127.0.0.1:1"]),
    "embed-search": ("embedstream_worker.search_cli", ["dataset", "a query"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_interrupted_while_it_loads_says_so_and_no_more(command: str) -> None:
    module, args = COMMANDS[command]
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell runs in the background
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('redis', 'pyarrow', 'numpy'):\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = {[command, *args]!r}\n"
        f"from {module} import main\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_takes_nothing_is_one_sentence(command: str) -> None:
    module, _ = COMMANDS[command]
    code = f"import sys; sys.argv = [{command!r}, '--help']; from {module} import main; main()"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert "standard output cannot be written: No space left on device" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", ""], "the model's name is empty"),
        (["--model", "hashing", "--device", "banana"], "--device banana: use auto, cpu, cuda:N or mps"),
        (["--model", "hashing", "--device", "cuda:"], "--device cuda:"),
        (["--model", "hashing", "--revision", "x"], "--revision x"),
    ],
)
def test_a_worker_refuses_what_it_cannot_run(args: list[str], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        worker.main([*args, "--redis", "redis://127.0.0.1:1"], standalone_mode=False)
    assert says in str(refused.value)


def test_a_file_that_fails_is_not_taken_for_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")

    monkeypatch.setattr("sys.argv", ["embed-test"])
    with pytest.raises(OSError, match="/somewhere"):
        run(command)


def test_what_is_in_hand_is_never_more_than_what_is_left() -> None:
    assert with_in_hand(STATUS, InHand(200, 6000, 6000)).rows == 299_200
    assert with_in_hand(STATUS, InHand(20_000, 600_000, 600_000)).rows == 299_500


def test_what_a_worker_committed_since_it_spoke_is_no_longer_in_hand() -> None:
    def record(name: str, hand: int, written: int) -> WorkerRecord:
        return WorkerRecord(
            name=name, host="h", pid=1, model="m", fingerprint="", engine="", device="", dtype="", roots=(),
            state="ready", started=0.0, in_hand={"j": InHand(hand, 10 * hand, 20 * hand)}, written={"j": written},
        )  # fmt: skip

    workers = [record("a", 300, 500), record("b", 100, 0)]
    assert in_hand_of("j", workers, {"a": 500}) == InHand(400, 4000, 8000)
    assert in_hand_of("j", workers, {"a": 700, "b": 400}) == InHand(100, 1000, 2000)
    assert in_hand_of("j", workers, {"a": 500, "c": 900}).rows == 400, "what a dead one wrote is nobody's here"
    assert in_hand_of("j", workers, {}).rows == 400, "an emptied Redis knows less than they"
    assert in_hand_of("other", workers, {}) == InHand()


def test_the_time_left_is_told_by_the_pace_of_late_if_workers_say_it() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=200)
    half = msgspec.structs.replace(STATUS, rows=0, failed=0, submitted=6000, tokens=0)
    with Progress(quiet=False, total_bytes=None, console=console) as progress:
        progress.update(half, InHand(3000, 9000, 9000), Rate(100.0, 7777.0))
    assert "100 rows/s, 7,777 tokens/s" in said.getvalue()
    assert ", 30.0 s left" in said.getvalue()


def test_the_time_left_is_said_to_be_a_guess_until_all_is_read() -> None:
    said = io.StringIO()
    reading = msgspec.structs.replace(STATUS, rows=0, failed=0, submitted=1000, tokens=0, sealed=False)
    with Progress(quiet=False, total_bytes=100, console=Console(file=said, force_terminal=True, width=200)) as progress:
        progress.position(0, 20)
        progress.update(reading, InHand(), Rate(100.0, 7777.0))
    assert ", about 50.0 s left" in said.getvalue()


def test_a_narrow_terminal_shows_the_time_left_and_all_that_is_waited_for() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=80)
    with Progress(quiet=False, total_bytes=None, console=console) as progress:
        progress.update(STATUS, InHand(), Rate())
        progress.notice("waiting for a worker: start one with `embed-worker --model m --redis redis://h:6379/0`")
        progress.update(msgspec.structs.replace(STATUS, rows=299_100), InHand(), Rate())
    shown = " ".join(said.getvalue().split())
    assert " left" in shown
    assert "redis://h:6379/0`" in shown


def test_a_variable_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError, match=r"EMBEDSTREAM_QUEUE_BYTES.*'abc'"):
        Settings.from_environment({"EMBEDSTREAM_QUEUE_BYTES": "abc"})


def test_where_the_errors_are_is_said_for_each_kind_of_output() -> None:
    assert errors_of("/data/out") == "/data/out/errors.jsonl"
    assert errors_of("redis:?prefix=docs:&ttl=60") == "the hash docs:_errors"


@pytest.mark.parametrize("flag", ["--lease-seconds", "--stall-seconds", "--drain-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_seconds_that_no_clock_can_count_are_refused(flag: str, value: str) -> None:
    done = CliRunner().invoke(worker, ["--model", "hashing", "--redis", "redis://127.0.0.1:1", flag, value])
    assert done.exit_code == 2
    assert f"{value} is no number of seconds" in done.output
