"""The private server and its lock, with real servers and, where a run is killed, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from e2e.harness import processes_mentioning, wait_until

from embedstream.errors import OutputBusy, ServerError
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream.settings import Settings
from embedstream_producer.embedded import OutputLock, PrivateServer, state_folder
from embedstream_producer.embedded import lock as output_lock
from embedstream_producer.embedded.programs import fake_program, find_program

HOLDER = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from embedstream.cli.starting import environment
from embedstream_producer.embedded import OutputLock, PrivateServer
from embedstream_producer.embedded.programs import fake_program, find_program
output, kind = sys.argv[1:]
lock = OutputLock(output)
server = PrivateServer.start(lock, program=fake_program() if kind == "fake" else find_program())
server.group.start(["sh", "-c", "trap '' HUP INT TERM; sleep 600; :"], sys.stderr, environment())
print(server.url, flush=True)
while True:
    try:
        for line in sys.stdin:
            exec(line)
        break
    except KeyboardInterrupt:
        server.check()
        print("interrupted, and the server is alive", flush=True)
"""

KILL = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of the test's own, with a short path, named in the environment of every process that the test
    starts; nothing may be left in it."""
    tmp_path_factory.getbasetemp()  # made before the change, so not in here
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        wait_until(lambda: not list(Path(folder).iterdir()), "what ends a group to clear its folder away", 10)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "an output")


@pytest.fixture
def said() -> list[str]:
    return []


@contextmanager
def holder(output: str, kind: str = "real") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A second process that holds the lock, with a server and a process that no signal but SIGKILL ends.

    It executes the lines it is sent.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, output, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = _out(process).readline().strip()
        assert url
        yield process, url
    finally:
        process.communicate()  # its standard input ends, and with it the process, unless it was killed


def _out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def ask(process: subprocess.Popen[str], line: str) -> str:
    """What a holder prints when it has executed a line."""
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _out(process).readline().strip()


def test_a_started_server_answers_and_a_stopped_one_leaves_no_process_and_no_socket(output: str, sockets: Path) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            assert connect(server.url).ping()
            assert [oct(folder.stat().st_mode)[-3:] for folder in sockets.iterdir()] == ["700"]
            assert processes_mentioning(str(sockets))
        assert not processes_mentioning(str(sockets))
        assert list(sockets.iterdir()) == []


def test_the_server_listens_on_no_port_and_keeps_nothing_on_disk(output: str) -> None:
    with OutputLock(output) as lock, PrivateServer.start(lock) as server, connect(server.url) as client:
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("save") == {"save": ""}


def test_the_server_takes_half_of_the_memory_a_queue_an_eighth(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream_producer.embedded.server.memory_bytes", lambda: 1 << 30)
    with OutputLock(output) as lock, PrivateServer.start(lock) as server, connect(server.url) as client:
        assert Broker(client, "q").memory_bound(Settings().queue_bytes) == 1 << 27


def test_the_next_server_is_empty(output: str) -> None:
    with OutputLock(output) as lock:
        for _ in range(2):
            with PrivateServer.start(lock) as server, connect(server.url) as client:
                assert client.dbsize() == 0
                client.set("k", "v")


def test_a_server_that_ends_before_its_time_is_noticed(output: str) -> None:
    with OutputLock(output) as lock, PrivateServer.start(lock) as server:
        with connect(server.url) as client:
            process = client.info("server")["process_id"]
        server.check()
        os.kill(process, signal.SIGKILL)

        def ended() -> bool:
            try:
                server.check()
            except ServerError as error:
                return "ended (exit status -9)" in str(error)
            return False

        wait_until(ended, "its end to be noticed")


def test_a_second_run_is_told_who_holds_the_lock(output: str) -> None:
    with holder(output) as (process, _), pytest.raises(OutputBusy, match=rf"pid {process.pid}: .*an output"):
        OutputLock(output)


def test_no_server_starts_without_the_lock(output: str) -> None:
    lock = OutputLock(output)
    lock.release()
    with pytest.raises(ServerError, match="lock the output"):
        PrivateServer.start(lock)


@pytest.mark.holds("taskiq-redis#131")
@pytest.mark.parametrize(
    ("kind", "last_line"),
    [("real", KILL), ("fake", KILL), ("real", "sys.exit()"), ("real", "raise RuntimeError('a fault')")],
)
def test_however_a_run_ends_its_processes_end_with_it_and_its_output_is_free(
    output: str, sockets: Path, kind: str, last_line: str
) -> None:
    with holder(output, kind) as (process, _):
        assert len(processes_mentioning(str(sockets))) > 1
        process.communicate(last_line)
        with OutputLock(output) as lock, PrivateServer.start(lock) as server:
            assert connect(server.url).ping()
        assert not processes_mentioning(str(sockets))
    assert not state_folder(output).exists()


def test_an_output_is_locked_until_the_last_process_of_a_killed_run_has_ended(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "CLAIM_SECONDS", 0.1)
    with holder(output) as (process, _):
        beside = "subprocess.Popen(['sleep', '600'], pass_fds=(lock.claim,), start_new_session=True)"
        survivor = int(ask(process, f"print({beside}.pid, flush=True)"))
        process.kill()
        process.wait()
        with pytest.raises(OutputBusy, match="a process of an earlier run does not end"):
            OutputLock(output)
        os.kill(survivor, signal.SIGKILL)
        monkeypatch.undo()
        OutputLock(output).release()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(output: str) -> None:
    with holder(output) as (process, url):
        assert ask(process, "print('listening', flush=True)") == "listening"
        os.killpg(process.pid, signal.SIGINT)
        assert _out(process).readline() == "interrupted, and the server is alive\n"
        assert connect(url).ping()


def test_a_server_that_cannot_start_says_why(output: str, sockets: Path) -> None:
    broken = replace(find_program(), command=("/bin/sh", "-c", "echo the disk is full; exit 3"))
    with OutputLock(output) as lock:
        with pytest.raises(ServerError, match=r"exit status 3.*\n.*the disk is full"):
            PrivateServer.start(lock, program=broken)
        with pytest.raises(ServerError, match=r"no server could be started: .*none-such"):
            PrivateServer.start(lock, program=replace(broken, command=("/none-such",)))
    assert not processes_mentioning(str(sockets))


def test_a_long_temporary_path_does_not_matter(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 150)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with OutputLock(output) as lock, PrivateServer.start(lock) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert connect(server.url).ping()
        assert len(os.fsencode(path)) <= 103
    assert not path.parent.exists()
    assert list(long.iterdir()) == []


def test_the_stand_in_runs_scripts_and_streams_and_says_who_can_reach_it(output: str, said: list[str]) -> None:
    with (
        OutputLock(output) as lock,
        PrivateServer.start(lock, program=fake_program(), say=said.append) as server,
        connect(server.url) as client,
    ):
        client.xgroup_create("s", "workers", "0", mkstream=True)
        body = bytes(range(256)) * 100
        entry = client.xadd("s", {"body": body})
        client.xreadgroup("workers", "w", {"s": ">"})
        [claimed] = client.xrange("s")
        assert claimed == (entry, {b"body": body})
        script = "return redis.call('XACK', KEYS[1], 'workers', ARGV[1]) + redis.call('XDEL', KEYS[1], ARGV[1])"
        assert client.eval(script, 1, "s", entry) == 2
    assert "any user of this machine can reach" in said[0]


def test_llama_index_10369_a_temporary_folder_that_is_not_utf_8_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"f\xff")
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with OutputLock(str(tmp_path / "out")) as lock, PrivateServer.start(lock) as server:
        assert connect(server.url).ping()
