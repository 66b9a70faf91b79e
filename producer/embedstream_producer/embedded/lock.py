"""One run at a time per output: a lock on the output's folder itself, and one in the state folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec

from embedstream.errors import OutputBusy, OutputError
from embedstream.masking import mask
from embedstream_producer.embedded.private import PrivateFolder, is_folder, open_state, state_folder

LOCK = "lock"
CLAIM = "claim"
SERVER_LOG = "server.log"
WORKER_LOG = "worker.log"

CLAIM_SECONDS = 30.0
"""Processes of a killed run are killed with it, but one may be in a call of the system that takes its time."""


class _Holder(msgspec.Struct, frozen=True):
    """Who holds a lock, written into it for the message of those who come second."""

    pid: int
    host: str
    command: str


class OutputLock:
    """An exclusive lock on an output; the system releases it when this process ends, however it ends.

    The folder of the output is locked itself, with no file in it, so other users are excluded too. The file in the
    state folder excludes this user's runs also from an output that is no folder, or one that was removed and made anew.

    Children never inherit it (a process made by a bare fork would: start children by exec). `claim`, an open file, is
    for them to inherit: the lock is not given while a process of an earlier run holds that. A context manager; once
    released it is done with. What was made for it goes away with it, as far as nobody has put anything there.

    Raises:
        OutputBusy: another run holds it; the message names the process if it is one of this user. Or a process of an
            earlier run does not end.
        OutputError: the output's folder cannot be made, lies where folders cannot be locked, or there is no folder for
            the state that is this user's alone.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._folder = Path(os.path.realpath(output)) if is_folder(output) else None
        self._made: list[Path] = []
        self._held = contextlib.ExitStack()
        try:
            with contextlib.ExitStack() as held:
                self.state, self._fd = self._acquire(held)
                self.claim = self._claim(held)
                self._held = held.pop_all()
        except OSError as error:
            self._unmake_folders()
            raise OutputError(
                f"{mask(output)}: cannot be locked ({error.filename or 'no locks'}: {error.strerror}): "
                f"choose an output that can be written (-o), or a running Redis (--redis)"
            ) from error
        except BaseException:
            self._unmake_folders()
            raise
        self.held = True

    def release(self) -> None:
        """Give the lock up. Twice is harmless."""
        if not self.held:
            return
        self.held = False
        if self.state.is_named(LOCK, self._fd):
            for name in (WORKER_LOG, SERVER_LOG, CLAIM, LOCK):  # the lock last, so that nothing else is left unlocked
                self.state.remove(name)
            self.state.drop()
        self._unmake_folders()
        self._held.close()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self, held: contextlib.ExitStack) -> tuple[PrivateFolder, int]:
        """Lock the state, so that a run of this user is named, then the output."""
        while True:
            if self._folder is not None:
                self._make_folder(self._folder)
            with contextlib.ExitStack() as tried:
                try:
                    state = tried.enter_context(contextlib.closing(open_state(state_folder(self.output))))
                    lock = _opened(tried, state.opener(LOCK, os.O_RDWR | os.O_CREAT))
                    folder = None if self._folder is None else _opened(tried, _open_folder(self._folder))
                except FileNotFoundError:
                    continue  # the run before us has just removed it
                if not _lock(lock):
                    raise OutputBusy(
                        f"{mask(self.output)}: another run {_read_holder(lock)}holds it: wait for that run, or end it"
                    )
                if not state.is_named(LOCK, lock):
                    continue
                if folder is not None:
                    if not _lock(folder):
                        raise OutputBusy(
                            f"{mask(self.output)}: another run, perhaps of another user, holds it: "
                            f"wait for that run, or end it"
                        )
                    if not _is_at(self._folder, folder):
                        continue
                command = shlex.join(map(mask, sys.argv))
                holder = _Holder(os.getpid(), socket.gethostname(), command)
                os.ftruncate(lock, 0)
                os.pwrite(lock, msgspec.json.encode(holder), 0)
                held.push(tried.pop_all())
                return state, lock

    def _claim(self, held: contextlib.ExitStack) -> int:
        claim = _opened(held, self.state.opener(CLAIM, os.O_RDWR | os.O_CREAT))
        deadline = time.monotonic() + CLAIM_SECONDS
        while not _lock(claim):
            if time.monotonic() >= deadline:
                raise OutputBusy(
                    f"{mask(self.output)}: a process of an earlier run does not end: "
                    f"end it (it holds {self.state.path / CLAIM} open) and run this again"
                )
            time.sleep(0.02)
        return claim

    def _make_folder(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):
                each.mkdir()
                self._made.append(each)

    def _unmake_folders(self) -> None:
        """Remove the folders that this lock made, as far as nobody has put anything into them."""
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _opened(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _lock(descriptor: int) -> bool:
    """Whether it is ours now. Raises `OSError` where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path | None, descriptor: int) -> bool:
    """Whether the path still leads to this open folder."""
    try:
        return path is not None and os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(lock: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(lock, 1 << 20, 0), type=_Holder)
    except msgspec.MsgspecError:
        return ""  # it has the lock and has not yet written its name
    where = "" if holder.host == socket.gethostname() else f" on {holder.host}"
    return f"(pid {holder.pid}{where}: {holder.command}) "
