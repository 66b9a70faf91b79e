"""How a command ends when nobody listens, nobody waits, or nothing can be said any more; and its live line."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from embedstream.cli.command import CONTEXT
from embedstream.cli.commands import run
from embedstream.cli.service_options import service_options
from embedstream.errors import UsageError
from embedstream.settings import Settings
from embedstream.terminal import echo, echo_json
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
        (ModuleNotFoundError("", name="psycopg"), 2, "psycopg is not installed: pip install 'embedstream[pgvector]'"),
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
    "embed-export": ("embedstream_producer.export_cli", ["dataset", "faiss:index"]),
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


def by_a_shell(script: str, *args: str) -> tuple[int, str]:
    """The exit code of a command (`"$@"`) as a shell starts it, and what it says on standard error."""
    command = ["sh", "-c", script, "sh", str(Path(sys.executable).parent / args[0]), *args[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&-"])
def test_a_standard_stream_that_is_closed_takes_what_is_printed_and_no_file_gets_its_place(
    closed: str, tmp_path: Path
) -> None:
    assert by_a_shell(f'exec "$@" {closed}', "embed-status", "--help") == (0, "")
    code, said = by_a_shell(f'exec "$@" {closed}', "embed-verify", str(tmp_path / "none"))
    assert (code, len(said.splitlines())) == (2, 1)


def test_a_working_folder_that_was_removed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && exec "$@"'
    code, said = by_a_shell(script, "embed-submit", "c.jsonl", "--model", "hashing")
    assert code == 2
    assert said == "Error: the folder that this was started in has been removed: change into another one (cd)\n"


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


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_click_705_a_terminal_that_lacks_characters_shows_others_and_changes_no_exit_code(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def command() -> int:
        echo("корпус.jsonl: 1 row")
        echo_json({"id": "λ"})
        return 3

    out = io.BytesIO()
    monkeypatch.setattr("sys.argv", ["embed-test"])
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding, write_through=True))
    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 3
    assert out.getvalue() == b"??????.jsonl: 1 row\n" + rb'{"id":"\u03bb"}' + b"\n", "JSON stays what it was"


@pytest.mark.parametrize("command", COMMANDS)
def test_click_705_every_command_shows_its_help_and_its_errors_in_latin_1(command: str, tmp_path: Path) -> None:
    module, args = COMMANDS[command]
    code = f"import sys; sys.argv[0] = 'c'; from {module} import main; main()"
    for more, ending in (["--help"], 0), ([*args[:-1], "нет", "--κόσμε"], 2):
        done = subprocess.run(
            [sys.executable, "-c", code, *more],
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, b"Usage: " in done.stdout + done.stderr) == (ending, True), done.stderr
        assert b"Traceback" not in done.stderr


def test_sequin_2155_a_variable_that_kubernetes_sets_for_a_service_is_no_setting_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ports: list[object] = []

    @click.command(context_settings=CONTEXT)
    @service_options
    def command(metrics_port: int | None, metrics_host: str, log_format: str) -> None:  # noqa: ARG001
        ports.append(metrics_port)

    monkeypatch.setattr("sys.argv", ["embed-test"])
    for value, read, lines in (("tcp://10.0.171.239:9400", None, 1), ("9400", 9400, 0)):
        caplog.clear()
        monkeypatch.setenv("EMBEDSTREAM_METRICS_PORT", value)
        for _ in range(2):
            with pytest.raises(SystemExit) as ended:
                run(command)
            assert ended.value.code == 0
        assert ports[-2:] == [read, read]
        assert [record.getMessage() for record in caplog.records] == [
            f"EMBEDSTREAM_METRICS_PORT={value} is Kubernetes' own for a service, and no setting "
            "(enableServiceLinks: false)"
        ] * lines
