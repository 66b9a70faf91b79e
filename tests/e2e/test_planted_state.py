"""An output folder that somebody else filled: what is planted there under the names that a run uses is left alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from e2e.harness import assert_exact, run, write_corpus


@pytest.fixture
def victims(tmp_path: Path) -> Path:
    """A folder of the user's, with files that must stay as they are."""
    folder = tmp_path / "victims"
    (folder / "below").mkdir(parents=True)
    for name in ("thesis.txt", "lock", "server.log", "below/deep.txt"):
        (folder / name).write_text("years of work")
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """`.embedstream` in the output of a corpus, as it is shipped with it."""
    folder = tmp_path / "out" / ".embedstream"
    folder.mkdir(parents=True)
    return folder


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


def test_a_link_in_place_of_the_state_folder_is_not_emptied(tmp_path: Path, planted: Path, victims: Path) -> None:
    planted.rmdir()
    planted.symlink_to(victims)
    before = snapshot(victims)
    submit(tmp_path)
    assert snapshot(victims) == before
    assert planted.is_symlink()


@pytest.mark.parametrize("name", ["lock", "claim", "server.log", "worker.log"])
def test_a_link_in_place_of_a_file_is_not_written_through(
    tmp_path: Path, planted: Path, victims: Path, name: str
) -> None:
    (planted / name).symlink_to(victims / "thesis.txt")
    before = snapshot(victims)
    submit(tmp_path)
    assert snapshot(victims) == before
    assert (planted / name).is_symlink()


def test_a_lock_that_is_held_there_holds_up_nobody(tmp_path: Path, planted: Path) -> None:
    (planted / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": "x"}))
    holder = subprocess.Popen(["flock", str(planted / "lock"), "sleep", "600"], start_new_session=True)
    try:
        submit(tmp_path)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
