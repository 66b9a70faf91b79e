"""How a command ends when nobody listens, nobody waits, or nothing can be said any more; and its live line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from embedstream.cli.commands import run
from embedstream.errors import UsageError
from embedstream.settings import Settings
from embedstream_producer.report import errors_of
from embedstream_worker.cli import worker


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("no such thing: use another"), 2, "Error: no such thing: use another"),
        (click.UsageError("what?"), 2, "what?"),
        (ModuleNotFoundError("", name="prometheus_client.core"), 2, "not installed: pip install 'embedstream[worker]'"),
        (ModuleNotFoundError("", name="rq"), 2, "rq is not installed: pip install 'embedstream[coordinator]'"),
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


def test_a_variable_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError, match=r"EMBEDSTREAM_QUEUE_BYTES.*'abc'"):
        Settings.from_environment({"EMBEDSTREAM_QUEUE_BYTES": "abc"})


def test_where_the_errors_are_is_said_for_each_kind_of_output() -> None:
    assert errors_of("/data/out") == "/data/out/_errors.jsonl"
    assert errors_of("redis:?prefix=docs:&ttl=60") == "the hash docs:_errors"


@pytest.mark.parametrize("flag", ["--lease-seconds", "--stall-seconds", "--drain-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_seconds_that_no_clock_can_count_are_refused(flag: str, value: str) -> None:
    done = CliRunner().invoke(worker, ["--model", "hashing", "--redis", "redis://127.0.0.1:1", flag, value])
    assert done.exit_code == 2
    assert f"{value} is no number of seconds" in done.output
