"""An output folder that somebody else filled: what is planted where a run's state once lay does nothing at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import RedisServer

from e2e.harness import assert_exact, run, write_corpus
from embedstream_producer.embedded.processes import identify
from embedstream_producer.embedded.programs import find_program


@pytest.fixture
def victims(tmp_path: Path) -> Path:
    """A folder of the user's, with files that must stay as they are."""
    folder = tmp_path / "victims"
    (folder / "below").mkdir(parents=True)
    for name in ("thesis.txt", "lock", "server.json.new", "below/deep.txt"):
        (folder / name).write_text("years of work")
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """`.embedstream` in the output of a corpus, as it is shipped with it."""
    folder = tmp_path / "out" / ".embedstream"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def record(**said: object) -> str:
    """A `server.json` as a run of this machine would leave it."""
    program = msgspec.to_builtins(find_program())
    return json.dumps({"program": program, "socket": "", "server": None, "children": [], **said})


def submit(tmp_path: Path) -> None:
    """Run the corpus into the output; all must end well."""
    texts = write_corpus(tmp_path / "c.jsonl", 50)
    done = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts)


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("beside", [False, True], ids=["in-the-folder", "beside-the-shards"])
def test_commands_in_an_append_only_file_are_not_replayed(tmp_path: Path, planted: Path, beside: bool) -> None:
    marker = tmp_path / "marker"
    words = ["CONFIG", "SET", "dir", str(marker)], ["SET", "planted", "1"], ["SHUTDOWN"]
    commands = [f"*{len(each)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in each) for each in words]
    folder = planted.parent if beside else planted
    folder.joinpath("appendonly.aof").write_text("".join(commands))
    folder.joinpath("server.json").write_text(record())
    if beside:
        (folder / "part-a.parquet").write_text("")  # else the folder is refused as something else
    before = snapshot(planted)
    texts = write_corpus(tmp_path / "c.jsonl", 50)
    done = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "out", texts)
    assert "the private Redis" not in done.stderr
    assert snapshot(planted) == before


def test_a_link_in_place_of_the_state_folder_is_not_emptied(tmp_path: Path, planted: Path, victims: Path) -> None:
    planted.rmdir()
    planted.symlink_to(victims)
    before = snapshot(victims)
    submit(tmp_path)
    assert snapshot(victims) == before
    assert planted.is_symlink()


@pytest.mark.parametrize("name", ["lock", "server.lock", "server.log", "server.json.new", "worker.log"])
def test_a_link_in_place_of_a_file_is_not_written_through(
    tmp_path: Path, planted: Path, victims: Path, name: str
) -> None:
    (planted / name).symlink_to(victims / "thesis.txt")
    before = snapshot(victims)
    submit(tmp_path)
    assert snapshot(victims) == before
    assert (planted / name).is_symlink()


def test_a_file_that_is_called_a_socket_is_not_removed(tmp_path: Path, planted: Path, victims: Path) -> None:
    (planted / "server.json").write_text(record(socket=str(victims / "below" / "deep.txt")))
    submit(tmp_path)
    assert (victims / "below" / "deep.txt").exists()


def test_a_process_that_is_called_a_worker_of_an_earlier_run_lives_on(
    tmp_path: Path, planted: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    process = msgspec.to_builtins(identify(sleeper.pid))
    (planted / "server.json").write_text(record(children=[process], server=process))
    submit(tmp_path)
    assert sleeper.poll() is None


def test_a_server_that_is_called_that_of_an_earlier_run_lives_on(
    tmp_path: Path, planted: Path, redis_server: RedisServer
) -> None:
    (planted / "server.json").write_text(record(socket=redis_server.socket))
    submit(tmp_path)
    assert redis_server.client().ping()


def test_a_lock_that_is_held_there_holds_up_nobody(tmp_path: Path, planted: Path) -> None:
    (planted / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": "x"}))
    holder = subprocess.Popen(["flock", str(planted / "lock"), "sleep", "600"], start_new_session=True)
    try:
        submit(tmp_path)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
