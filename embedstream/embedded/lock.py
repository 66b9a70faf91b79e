"""One run at a time per output: a lock in the state folder, which is what embedded mode keeps beside the output."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path
from types import TracebackType

import msgspec

from embedstream.errors import OutputBusy, OutputError

STATE = ".embedstream"
LOCK = "lock"


def state_folder(output: str) -> Path:
    """Where embedded mode keeps its state: inside an output folder, else in the user's state folder by a hash."""
    if output.startswith("redis:") or "://" in output:
        base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        return base / "embedstream" / hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    return Path(output).absolute() / STATE


class _Holder(msgspec.Struct, frozen=True):
    """Who holds a lock, written into it for the message of those who come second."""

    pid: int
    host: str
    command: str


class OutputLock:
    """An exclusive lock on an output; the system releases it when this process ends, however it ends.

    Children never inherit it (a process made by a bare fork would: start children by exec). A context manager; once
    released it is done with. A state folder in which nothing but the lock was made goes away with it.

    Raises:
        OutputBusy: another run holds it; the message names the process.
        OutputError: the output's folder cannot be made, or lies where files cannot be locked.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.state = state_folder(output)
        self._path = self.state / LOCK
        self._made: list[Path] = []
        self._fd: int | None = self._acquire()

    @property
    def held(self) -> bool:
        return self._fd is not None

    def remove_state(self) -> None:
        """Delete the state folder whole. For a finished job, after its server has stopped."""
        if self._fd is not None and self._is_named(self._fd):
            self._drop()

    def release(self) -> None:
        """Give the lock up. Twice is harmless."""
        if self._fd is None:
            return
        if self._is_named(self._fd) and {path.name for path in self.state.iterdir()} == {LOCK}:
            self._drop()
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> int:
        try:
            while True:
                self._make_folder()
                try:
                    fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                except FileNotFoundError:
                    continue  # the run before us has just removed its state
                if self._lock(fd):
                    return fd
        except OSError as error:
            self._unmake_folders()
            raise OutputError(
                f"{self.output}: cannot be locked ({self._path}: {error.strerror}): "
                f"choose an output that can be written (-o), or a running Redis (--redis)"
            ) from error

    def _lock(self, fd: int) -> bool:
        """Whether `fd` is now locked and still what the path names; closed if not."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = self._is_named(fd)  # else the run before us removed it meanwhile
        except BlockingIOError:
            holder = _read_holder(fd)
            os.close(fd)
            raise OutputBusy(f"{self.output}: another run {holder}holds it: wait for that run, or end it") from None
        except OSError:
            os.close(fd)
            raise
        if ours:
            os.ftruncate(fd, 0)
            os.pwrite(fd, msgspec.json.encode(_Holder(os.getpid(), socket.gethostname(), shlex.join(sys.argv))), 0)
        else:
            os.close(fd)
        return ours

    def _is_named(self, fd: int) -> bool:
        """Whether the lock's path still leads to this open file."""
        try:
            return os.path.samestat(os.fstat(fd), self._path.stat())
        except FileNotFoundError:
            return False

    def _make_folder(self) -> None:
        missing: list[Path] = []
        folder = self.state
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700 if folder == self.state else 0o777)
                self._made.append(folder)
        if not self.state.is_dir():
            raise NotADirectoryError(20, "not a folder", str(self.state))

    def _drop(self) -> None:
        """Empty and remove the folder; the lock goes last, so that nobody finds the rest unlocked."""
        for path in self.state.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._path.unlink(missing_ok=True)
        self._made = [*(folder for folder in self._made if folder != self.state), self.state]
        self._unmake_folders()

    def _unmake_folders(self) -> None:
        """Remove the folders that this lock made, as far as nobody else has put anything into them."""
        for folder in sorted(self._made, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def _read_holder(fd: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(fd, 65536, 0), type=_Holder)
    except msgspec.MsgspecError:
        return ""  # it has the lock and has not yet written its name
    where = "" if holder.host == socket.gethostname() else f" on {holder.host}"
    return f"(pid {holder.pid}{where}: {holder.command}) "
