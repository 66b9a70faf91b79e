"""The private server and its lock, with real servers and, where a run is killed, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import msgspec
import pytest

from embedstream.errors import OutputBusy, ServerError
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream.settings import Settings
from embedstream_producer.embedded import OutputLock, PrivateFolder, PrivateServer, server, state_folder
from embedstream_producer.embedded import state as server_state
from embedstream_producer.embedded.private import open_state
from embedstream_producer.embedded.processes import Process, end, identify, is_running, wait_ended
from embedstream_producer.embedded.programs import Program, fake_program, find_program
from embedstream_producer.embedded.state import ServerRecord, read_record

HOLDER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from embedstream_producer.embedded import OutputLock, PrivateServer
from embedstream_producer.embedded.programs import fake_program, find_program
output, kind, *children = sys.argv[1:]
lock = OutputLock(output)
server = PrivateServer.start(lock, program=fake_program() if kind == "fake" else find_program())
for child in children:
    server.record_child(int(child))
print(server.url, flush=True)
while True:
    try:
        for line in sys.stdin:
            exec(line)
        break
    except KeyboardInterrupt:
        print("interrupted, server", "alive" if server.alive() else "dead", flush=True)
"""


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of the test's own, with a short path; nothing may be left in it."""
    tmp_path_factory.getbasetemp()  # made before the change, so not in here
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "an output")


@pytest.fixture
def said() -> list[str]:
    return []


@contextmanager
def holder(output: str, kind: str = "real", *children: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A second process that holds the lock and runs a server; it executes the lines it is sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, output, kind, *map(str, children)],
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


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def _out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


@contextmanager
def state_of(output: str) -> Iterator[PrivateFolder]:
    with closing(open_state(state_folder(output))) as state:
        yield state


def server_of(output: str) -> Process:
    with state_of(output) as state:
        record = read_record(state)
    assert record is not None
    assert record.server is not None
    return record.server


def put(url: str, key: str, value: str) -> None:
    with connect(url) as client:
        client.set(key, value)


def get(url: str, key: str) -> object:
    with connect(url) as client:
        return client.get(key)


def test_a_started_server_answers_and_a_stopped_one_leaves_no_process_and_no_socket(output: str, sockets: Path) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
            process = server_of(output)
            assert server.alive()
            assert [oct(folder.stat().st_mode)[-3:] for folder in sockets.iterdir()] == ["700"]
        assert not server.alive()
        assert not is_running(process)
        assert list(sockets.iterdir()) == []


def test_the_server_listens_on_no_port(output: str) -> None:
    with OutputLock(output) as lock, PrivateServer.start(lock) as server, connect(server.url) as client:
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}


def test_the_server_takes_half_of_the_memory_a_queue_an_eighth(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "memory_bytes", lambda: 1 << 30)
    with OutputLock(output) as lock, PrivateServer.start(lock) as started, connect(started.url) as client:
        assert Broker(client, "q").memory_bound(Settings().queue_bytes) == 1 << 27


def test_data_survives_a_stop_and_a_start(output: str) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
        with PrivateServer.start(lock) as server:
            assert get(server.url, "k") == b"v"


def test_data_survives_sigkill_of_the_server(output: str) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
            process = server_of(output)
            os.kill(process.pid, signal.SIGKILL)
            assert wait_ended(process, 10)
            assert not server.alive()
        with PrivateServer.start(lock) as server:
            assert get(server.url, "k") == b"v"


def test_a_second_run_is_told_who_holds_the_lock(output: str) -> None:
    with holder(output) as (process, _), pytest.raises(OutputBusy, match=rf"pid {process.pid}: .*an output"):
        OutputLock(output)


def test_the_lock_is_free_once_its_holder_has_left(output: str) -> None:
    with holder(output) as (process, _):
        process.communicate()
        with OutputLock(output) as lock:
            assert lock.held


def test_removing_the_state_leaves_the_vectors_alone(output: str) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock):
            (Path(output) / "part-1.parquet").write_text("vectors")
        lock.remove_state()
        assert [path.name for path in Path(output).iterdir()] == ["part-1.parquet"]
    assert [path.name for path in Path(output).iterdir()] == ["part-1.parquet"]


def test_no_server_starts_without_the_lock(output: str) -> None:
    lock = OutputLock(output)
    lock.release()
    with pytest.raises(ServerError, match="lock the output"):
        PrivateServer.start(lock)


@pytest.mark.holds("taskiq-redis#131")
def test_sigkill_of_a_run_frees_the_lock_and_the_next_ends_its_processes_and_keeps_its_data(
    output: str, said: list[str], sleeper: subprocess.Popen[bytes]
) -> None:
    with holder(output, "real", sleeper.pid) as (process, url):
        put(url, "k", "v")
        survivor = server_of(output)
        process.kill()
        process.wait()
        assert is_running(survivor)
        with OutputLock(output) as lock, PrivateServer.start(lock, say=said.append) as server:
            assert sleeper.wait(10) == -signal.SIGTERM
            assert not is_running(survivor)
            assert get(server.url, "k") == b"v"
    assert any("ended what an earlier run left" in line for line in said)


def test_a_surviving_server_is_ended_by_its_pid_when_its_socket_is_gone(output: str) -> None:
    with holder(output) as (process, url):
        put(url, "k", "v")
        survivor = server_of(output)
        process.kill()
        process.wait()
        Path(url.removeprefix("unix://")).unlink()
        with OutputLock(output) as lock, PrivateServer.start(lock) as server:
            assert not is_running(survivor)
            assert get(server.url, "k") == b"v"


def test_a_surviving_server_is_found_by_its_socket_when_its_pid_was_never_noted(output: str) -> None:
    with holder(output) as (process, url):
        put(url, "k", "v")
        survivor = server_of(output)
        process.kill()
        process.wait()
        _note(output, lambda record: msgspec.structs.replace(record, server=None))
        with OutputLock(output) as lock, PrivateServer.start(lock) as server:
            assert not is_running(survivor)
            assert get(server.url, "k") == b"v"


def test_two_servers_never_share_a_folder_even_if_all_notes_are_lost(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_state, "CLAIM_SECONDS", 0.1)
    with holder(output) as (process, url):
        survivor = server_of(output)
        process.kill()
        process.wait()
        (state_folder(output) / server_state.RECORD).unlink()
        with OutputLock(output) as lock:
            with pytest.raises(ServerError, match="still works here"):
                PrivateServer.start(lock)
            assert is_running(survivor)
            assert end(survivor, 10)
            server_state.remove_socket(url.removeprefix("unix://"))


def test_a_stranger_with_the_pid_of_an_old_process_is_left_alone(
    output: str, sleeper: subprocess.Popen[bytes], said: list[str]
) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock):
            pass
        stranger = identify(sleeper.pid)
        assert stranger is not None
        old = Process(stranger.pid, "before " + stranger.started)
        _note(output, lambda record: msgspec.structs.replace(record, server=old, children=(old,)))
        with PrivateServer.start(lock, say=said.append):
            pass
    assert sleeper.poll() is None
    assert said == []


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(output: str) -> None:
    with holder(output) as (process, url):
        assert process.stdin is not None
        process.stdin.write("print('listening', flush=True)\n")
        process.stdin.flush()
        assert _out(process).readline() == "listening\n"
        os.killpg(process.pid, signal.SIGINT)
        assert _out(process).readline() == "interrupted, server alive\n"
        put(url, "k", "v")
        process.communicate()


@pytest.mark.parametrize("last_line", ["sys.exit()", "raise RuntimeError('a fault')"])
def test_the_server_does_not_outlive_a_run_that_forgets_to_stop_it(output: str, last_line: str) -> None:
    with holder(output) as (process, _):
        server = server_of(output)
        process.communicate(last_line)
        assert not is_running(server)


def test_a_cut_off_end_of_the_file_costs_only_what_was_cut(output: str, said: list[str]) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
            put(server.url, "last", "v")
        file = _written(output)
        os.truncate(file, file.stat().st_size - 3)
        with PrivateServer.start(lock, say=said.append) as server:
            assert get(server.url, "k") == b"v"
            assert get(server.url, "last") is None
    assert said == []


def test_a_damaged_file_is_put_aside_and_the_server_starts_empty(output: str, said: list[str]) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v" * 100)
        file = _written(output)
        damaged = b"damage" + file.read_bytes()[6:]
        file.write_bytes(damaged)
        with PrivateServer.start(lock, say=said.append) as server:
            assert get(server.url, "k") is None
        kept = [path for path in lock.state.path.rglob("*") if path.is_file() and ".aside-" in str(path)]
        assert damaged in [path.read_bytes() for path in kept]
    assert "cannot be read, put aside" in said[0]


def test_a_server_that_cannot_start_says_why_and_leaves_the_data_in_place(output: str) -> None:
    real = find_program()
    broken = msgspec.structs.replace(real, command=("/bin/sh", "-c", "echo the disk is full; exit 3"))
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
        with pytest.raises(ServerError, match=r"exit status 3.*\n.*the disk is full"):
            PrivateServer.start(lock, program=broken)
        with PrivateServer.start(lock) as server:
            assert get(server.url, "k") == b"v"


def test_files_of_a_newer_server_are_put_aside(output: str, said: list[str]) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock) as server:
            put(server.url, "k", "v")
            newer = Program(server.program.product, "99.0.1", server.program.command)
        _note(output, lambda record: msgspec.structs.replace(record, program=newer))
        with PrivateServer.start(lock, say=said.append) as server:
            assert get(server.url, "k") is None
        assert list(lock.state.path.glob("appendonly*.aside-1"))
    assert "written by redis 99.0.1" in said[0] or "written by valkey 99.0.1" in said[0]


def test_a_long_temporary_path_does_not_matter(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 150)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with OutputLock(output) as lock, PrivateServer.start(lock) as server:
        path = Path(server.url.removeprefix("unix://"))
        put(server.url, "k", "v")
        assert len(os.fsencode(path)) <= 103
    assert not path.parent.exists()
    assert list(long.iterdir()) == []


def test_the_stand_in_runs_scripts_and_streams_and_says_that_it_keeps_nothing(output: str, said: list[str]) -> None:
    with OutputLock(output) as lock:
        with PrivateServer.start(lock, program=fake_program(), say=said.append) as server:
            with connect(server.url) as client:
                client.xgroup_create("s", "workers", "0", mkstream=True)
                body = bytes(range(256)) * 100
                entry = client.xadd("s", {"body": body})
                client.xreadgroup("workers", "w", {"s": ">"})
                [claimed] = client.xrange("s")
                assert claimed == (entry, {b"body": body})
                script = "return redis.call('XACK', KEYS[1], 'workers', ARGV[1]) + redis.call('XDEL', KEYS[1], ARGV[1])"
                assert client.eval(script, 1, "s", entry) == 2
            process = server_of(output)
        assert not is_running(process)
    assert "keeps nothing on disk" in said[0]


def test_the_stand_in_ends_with_a_run_that_is_killed(output: str) -> None:
    with holder(output, "fake") as (process, _):
        server = server_of(output)
        process.kill()
        assert wait_ended(server, 10)


def _note(output: str, change: Callable[[ServerRecord], ServerRecord]) -> None:
    with state_of(output) as state:
        record = read_record(state)
        assert record is not None
        server_state.write_record(state, change(record))


def _written(output: str) -> Path:
    """The append-only file that holds the commands written since the last rewrite."""
    state = state_folder(output)
    return next(state.glob("appendonly*/*.incr.aof"), state / "appendonly.aof")


def test_llama_index_10369_a_temporary_folder_that_is_not_utf_8_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"f\xff")
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with OutputLock(str(tmp_path / "out")) as lock, PrivateServer.start(lock) as server:
        assert connect(server.url).ping()
