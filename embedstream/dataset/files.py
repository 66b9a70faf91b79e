"""Files that are whole or not there: written beside their place, made durable, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from embedstream.errors import OutputError
from embedstream.failpoints import reach

TEMPORARY = ".tmp-"
"""In the names of files that are not whole yet, or never will be."""

_ADVICE = {
    errno.ENOSPC: "no space left on the device: free some",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "permission denied: make it writable for this user",
    errno.EPERM: "permission denied: make it writable for this user",
    errno.EROFS: "the file system is mounted read-only: choose another output (-o)",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another output (-o)",
    errno.EEXIST: "there is a file of that name: choose another output (-o)",
    errno.ENAMETOOLONG: "the path is too long: choose another output (-o)",
}

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


SWEPT_TRIES = 3
"""How often a file is written before it is given up that others remove half-written: each does so once."""


class Readable(Protocol):
    """Anything whose bytes can be written: `bytes`, `memoryview`, an Arrow buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


def write_durable(path: Path, pieces: Iterable[Readable], folder: int) -> tuple[int, str]:
    """Put the pieces, one after the other, into `path`, replacing it at once or not at all. Returns bytes and SHA-256.

    `folder`: an open descriptor of the folder of `path`, which is not looked for again.

    When this returns, the file survives a power cut. A reader never sees it half-written; what a crash leaves is named
    `.<name>.tmp-<uuid>`, which readers of a folder pass over.

    The finalizer of the same output removes such files, and cannot know that one is still being written: then it is
    written again, if the pieces can be had again.

    Raises:
        OSError: with nothing changed at `path`.
        OutputError: the same.
    """
    tries = SWEPT_TRIES if isinstance(pieces, Sequence) else 1
    while (written := _put(path, pieces, folder)) is None:
        tries -= 1
        if not tries:
            raise OutputError(f"{path}: cannot write: somebody removes it half-written: try again")
    sync_folder(folder)
    return written


def summed(pieces: Iterable[Readable], write: Callable[[Readable], object]) -> tuple[int, str]:
    """Write the pieces, one after the other; returns their bytes and their SHA-256 in hex."""
    size, digest = 0, hashlib.sha256()
    for piece in pieces:
        write(piece)
        size += memoryview(piece).nbytes
        digest.update(piece)
    return size, digest.hexdigest()


def _put(path: Path, pieces: Iterable[Readable], folder: int) -> tuple[int, str] | None:
    """Bytes and SHA-256 of the file in its place; None if it was removed on its way there, and the folder is
    there."""
    temporary = f".{path.name}{TEMPORARY}{uuid.uuid4().hex}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as file:
            written = summed(pieces, file.write)
            file.flush()
            os.fsync(file.fileno())
        reach("file.written")
        try:
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            return None
        reach("file.renamed")
    except BaseException:
        # One that cannot be removed is left: it counts for nothing without a manifest.
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return written


def refuse_special(path: Path) -> None:
    """Raise `OutputError` if what lies there is no regular file: opening a named pipe may never return.

    A link counts as what it leads to. Where that is, and what cannot be looked at, is for the caller that opens it.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        what = _SPECIAL.get(stat.S_IFMT(mode), "something else")
        raise OutputError(f"{path}: cannot read: is {what}, not a file: restore the file, or move it out of the folder")


def sync_folder(folder: int) -> None:
    """Make renames and removals in an open folder durable."""
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network file systems have no such call; there a rename is as durable as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def cannot(verb: str, path: Path, error: OSError, folder: Path | None = None) -> OutputError:
    """One sentence about what could not be done. `folder`: where that was; None: where `path` lies."""
    why = _ADVICE.get(error.errno or 0) or error.strerror or str(error)
    if error.errno == errno.ENOENT:
        why = _missing(verb, folder or path.parent)
    return OutputError(f"{path}: cannot {verb}: {why}")


def _missing(verb: str, folder: Path) -> str:
    """Why something is said not to be there."""
    if not folder.is_dir():
        return "the folder is gone: bring it back, or mount its disk again"
    return f"{folder} takes no files: choose another output (-o)" if verb == "write" else "the file is gone: restore it"
