"""Files that are whole or not there: written beside their place, made durable, then renamed into it."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable
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
    errno.ENOENT: "the folder is gone: bring it back, or mount its disk again",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another output (-o)",
    errno.EEXIST: "there is a file of that name: choose another output (-o)",
    errno.ENAMETOOLONG: "the path is too long: choose another output (-o)",
}


class Readable(Protocol):
    """Anything whose bytes can be written: `bytes`, `memoryview`, an Arrow buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


def write_durable(path: Path, pieces: Iterable[Readable]) -> None:
    """Put the pieces, one after the other, into `path`, replacing it at once or not at all.

    When this returns, the file survives a power cut. A reader never sees it half-written; what a crash leaves is named
    `<name>.tmp-<uuid>`.

    Raises:
        OutputError: with nothing changed at `path`.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            reach("file.written")
            temporary.replace(path)
            reach("file.renamed")
        except BaseException:
            remove(temporary)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise cannot("write", path, error) from error


def remove(path: Path) -> None:
    """Remove a file if it is there. One that cannot be removed is left: it counts for nothing without a manifest."""
    try:
        path.unlink()
    except OSError:
        return


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call; there a rename is as durable as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def cannot(verb: str, path: Path, error: OSError) -> OutputError:
    """One sentence about what could not be done."""
    why = _ADVICE.get(error.errno or 0) or error.strerror or str(error)
    return OutputError(f"{path}: cannot {verb}: {why}")
