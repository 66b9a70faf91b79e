"""The user's own folder for what embedded mode keeps, `$XDG_STATE_HOME/embedstream/<hash of the output>`.

A user who can write into this folder can make a run wait, or write elsewhere. So it is never inside an output, which
other users may own or write: it belongs to this user alone, and its files are opened through its descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from embedstream.errors import OutputError
from embedstream.jobs import without_credentials

TRIES = 10
"""To make folders that other runs make and remove at the same time."""

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PrivateFolder:
    """A folder that is ours alone, held open."""

    def __init__(self, path: Path, descriptor: int, made: Sequence[Path]) -> None:
        """`made`: the folders above those of ours that were made for it, from the top."""
        self.path = path
        self._descriptor = descriptor
        self._made = made

    def close(self) -> None:
        os.close(self._descriptor)

    def opener(self, name: str, flags: int) -> int:
        """For `open(name, ..., opener=folder.opener)`: a file of this folder, for this user alone, and no link."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._descriptor)

    def read(self, name: str) -> bytes | None:
        """A file whole; None if there is none."""
        try:
            with open(name, "rb", opener=self.opener) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file or a link; nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def is_named(self, name: str, descriptor: int) -> bool:
        """Whether a name still leads to this open file."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), found)

    def drop(self) -> None:
        """Remove the folder itself, and those above it that are ours or were made for it, as far as they are empty."""
        with contextlib.suppress(OSError):
            for folder in (self.path, self.path.parent, *reversed(self._made)):
                folder.rmdir()


def state_folder(output: str) -> Path:
    """Where embedded mode keeps the state of an output. Equal for equal places, however they are spelled.

    Raises:
        OutputError: the user has no folder for it.
    """
    place = os.path.realpath(output) if is_folder(output) else without_credentials(output)
    return _root() / hashlib.blake2b(place.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def is_folder(output: str) -> bool:
    """Whether an output is a folder of this machine."""
    return not output.startswith("redis:") and "://" not in output


def open_state(path: Path) -> PrivateFolder:
    """Open a state folder, made if need be.

    Raises:
        OutputError: it cannot be made; or it, or one above it, belongs to another user or may be written by others.
        FileNotFoundError: another run removed it meanwhile.
    """
    root = path.parent
    made: list[Path] = []
    with contextlib.ExitStack() as opened:
        try:
            above = _open_root(root, made)
        except OSError as error:
            raise _unusable(root, error.strerror or str(error)) from error
        opened.callback(os.close, above)
        return PrivateFolder(path, _open_private(path, above), made)


def _open_root(root: Path, made: list[Path], tries: int = TRIES) -> int:
    """Open the folder that holds all states. The folders above it that are missing are made, and added to `made`."""
    base = root.parent
    try:
        for folder in reversed((base, *base.parents)):
            if not folder.exists():
                folder.mkdir(0o700)
                made.append(folder)
        _refuse_shared(base)
        return _open_private(root)
    except (FileExistsError, FileNotFoundError):  # another run may have just made or removed it
        if tries == 1:
            raise
        return _open_root(root, made, tries - 1)


def _root() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    with contextlib.suppress(RuntimeError):  # nobody knows a home of this user
        base = Path(given) if given.startswith("/") else Path("~/.local/state").expanduser()
        if base.is_absolute():
            return base / "embedstream"
    raise _unusable(Path("~/.local/state"), "this user has no home")


def _refuse_shared(base: Path) -> None:
    """A folder in which others may replace what is ours: somebody else's, or one that all may write."""
    found = base.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise _unusable(base, "belongs to another user")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise _unusable(base, "may be written by all")


def _open_private(path: Path, above: int | None = None) -> int:
    """Open a folder for nobody else, made if need be; `above` is the descriptor of the one it lies in."""
    name = path.name if above is not None else str(path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=above)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise _unusable(path, "is a link, or no folder") from error
        raise
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise _unusable(path, "belongs to another user")
        if found.st_mode & 0o022:
            raise _unusable(path, "may be written by others")
        if found.st_mode & 0o077 or (found.st_mode & 0o700) != 0o700:
            os.fchmod(descriptor, 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unusable(path: Path, why: str) -> OutputError:
    return OutputError(
        f"{path}: {why}, and what embedded mode keeps must lie where this user alone can write: "
        f"set XDG_STATE_HOME to such a folder, or name a running Redis (--redis)"
    )
