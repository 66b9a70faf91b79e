"""The lock on an output, within one process; what happens between processes is in `test_embedded`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from embedstream.embedded import OutputLock, state_folder
from embedstream.errors import OutputBusy, OutputError


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "an output")


def test_a_lock_whose_file_was_removed_by_its_holder_excludes_again() -> None:
    output = "redis:?prefix=removed:"
    first = OutputLock(output)
    first.remove_state()
    with OutputLock(output):
        first.release()
        with pytest.raises(OutputBusy):
            OutputLock(output)


def test_children_do_not_inherit_the_lock(output: str) -> None:
    lock = OutputLock(output)
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        lock.release()
        OutputLock(output).release()
    finally:
        child.kill()
        child.wait()


def test_a_lock_alone_leaves_nothing_behind(output: str) -> None:
    with OutputLock(output):
        assert state_folder(output).is_dir()
    assert not Path(output).exists()
    assert not state_folder(output).exists()


def test_an_output_that_cannot_be_made_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be locked"):
        OutputLock(str(tmp_path / "file" / "out"))


def test_a_redis_output_keeps_its_state_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folders = {state_folder(f"redis://:secret@host/0?prefix={prefix}:") for prefix in "ab"}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path / "embedstream"}
    assert not any("secret" in str(folder) for folder in folders)
