"""The lock on an output, within one process; what happens between processes is in `test_embedded`."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedstream.errors import OutputBusy, OutputError
from embedstream_producer.embedded import OutputLock, state_folder


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "an output")


def test_a_lock_whose_file_was_removed_excludes_again() -> None:
    output = "redis:?prefix=removed:"
    first = OutputLock(output)
    for name in ("lock", "claim"):
        (first.state.path / name).unlink()
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


def test_two_spellings_of_one_folder_are_one_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with OutputLock(str(tmp_path / "out")):
        for other in (tmp_path / "link" / "out", tmp_path / "x" / ".." / "out"):
            with pytest.raises(OutputBusy, match=f"pid {os.getpid()}"):
                OutputLock(str(other))


def test_a_run_with_another_state_home_is_excluded_by_the_folder_itself(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutputLock(output):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
        with pytest.raises(OutputBusy, match="perhaps of another user"):
            OutputLock(output)
        assert os.listdir(output) == []  # noqa: PTH208
    OutputLock(output).release()


def test_an_output_that_is_made_anew_while_a_run_is_at_it_is_still_locked(output: str) -> None:
    with OutputLock(output):
        Path(output).rmdir()
        Path(output).mkdir()
        with pytest.raises(OutputBusy):
            OutputLock(output)


def test_who_holds_an_output_is_said_without_passwords(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["embed-submit", "-o", "redis://:hunter2@h/0?prefix=d:", "--redis=redis://me:a/hunter2@h"]
    monkeypatch.setattr("sys.argv", given)
    with OutputLock(output) as lock:
        with pytest.raises(OutputBusy, match="embed-submit -o") as refused:
            OutputLock(output)
        kept = [path.read_text() for path in lock.state.path.iterdir()]
    assert "hunter2" not in " ".join([str(refused.value), *kept])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder


def test_all_that_is_made_for_the_state_is_for_this_user_alone(output: str, home: Path) -> None:
    before = os.umask(0)
    try:
        with OutputLock(output) as lock:
            made = [home.parent, home, lock.state.path.parent, lock.state.path, *lock.state.path.iterdir()]
            assert {oct(path.stat().st_mode & 0o077) for path in made} == {"0o0"}
    finally:
        os.umask(before)


def test_a_state_folder_that_others_may_have_a_say_in_is_refused_untouched(
    output: str, home: Path, tmp_path: Path
) -> None:
    state = state_folder(output)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "lock").write_text("theirs")
    for folder in (state, state.parent):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.symlink_to(elsewhere)
        with pytest.raises(OutputError, match=r"is a link, or no folder.*set XDG_STATE_HOME"):
            OutputLock(output)
        folder.unlink()
        folder.mkdir(mode=0o700)
        folder.chmod(0o777)
        with pytest.raises(OutputError, match=r"may be written by others.*set XDG_STATE_HOME"):
            OutputLock(output)
        folder.rmdir()
        if folder == state:
            state.parent.rmdir()
    home.chmod(0o777)
    with pytest.raises(OutputError, match="may be written by all"):
        OutputLock(output)
    assert [path.read_text() for path in elsewhere.iterdir()] == ["theirs"]
    assert not Path(output).exists()


def test_of_a_new_home_nothing_is_left_but_what_was_there(output: str, home: Path) -> None:
    with OutputLock(output), OutputLock(output + "2"):
        assert home.is_dir()
    assert not home.parent.exists()
    home.mkdir(parents=True)
    OutputLock(output).release()
    assert list(home.parent.rglob("*")) == [home]


def test_runs_that_begin_and_end_at_once_do_not_take_each_others_folders_away(tmp_path: Path, home: Path) -> None:
    def run(name: str) -> None:
        for _ in range(50):
            OutputLock(str(tmp_path / name)).release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, "abcd"))
    assert not list(home.rglob("*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_a_state_folder_of_another_user_is_refused(output: str, home: Path) -> None:
    for folder in (home, state_folder(output).parent, state_folder(output)):
        folder.mkdir(parents=True)
        os.chown(folder, 12345, 12345)
        with pytest.raises(OutputError, match="belongs to another user"):
            OutputLock(output)
        os.chown(folder, 0, 0)


def test_without_a_folder_for_the_state_one_sentence_says_what_to_set(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for home in (str(tmp_path / "file" / "state"), "/proc/nothing"):
        monkeypatch.setenv("XDG_STATE_HOME", home)
        with pytest.raises(OutputError, match="set XDG_STATE_HOME"):
            OutputLock(output)
    monkeypatch.setenv("XDG_STATE_HOME", "relative/to/the/working/folder")
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(OutputError, match="has no home"):
        OutputLock(output)


def test_a_released_lock_removes_nothing_that_we_did_not_make(output: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("keep")
    with OutputLock(output) as lock:
        (lock.state.path / "server.log").symlink_to(tmp_path / "data")
        (lock.state.path / "a note").write_text("not ours")
    assert [path.name for path in lock.state.path.iterdir()] == ["a note"]
    assert (tmp_path / "data").read_text() == "keep"
    (lock.state.path / "a note").unlink()
