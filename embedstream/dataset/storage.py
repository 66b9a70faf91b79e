"""Where the files of a dataset lie: a folder, or keys below a prefix of a bucket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from embedstream.dataset.beneath import make_beneath, open_beneath
from embedstream.dataset.files import Readable, cannot, refuse_special, sync_folder, write_durable
from embedstream.dataset.objects import is_object, parse_object
from embedstream.errors import OutputError
from embedstream.failpoints import reach


class Storage(Protocol):
    """Files of one dataset, by their names without a path. Every method raises `OutputError`, in one sentence."""

    @property
    def quick_piece(self) -> int | None:
        """Bytes that are well read at once where each read costs a request; None where it does not."""

    def path(self, name: str) -> str:
        """As people and SQL call a file."""

    def prepare(self) -> None:
        """Make the place if it can be made."""

    def prove_writable(self) -> None:
        """Write something that nobody sees."""

    def names(self) -> list[str]:
        """Of all files, in order; none if there is no such place."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name; one question for all of them."""

    def sha256(self, name: str) -> tuple[int, str]:
        """Bytes of a file, and their SHA-256 in hex."""

    def open(self, name: str) -> pa.NativeFile:
        """A file for reading at any place; what fails in reading it is an `OSError` for `cannot_read`."""

    def read(self, name: str) -> bytes | None:
        """A small file whole; None if there is none."""

    def write(self, name: str, pieces: Iterable[Readable]) -> tuple[int, str]:
        """Put a file there at once or not at all, replacing the one of that name; durable when this returns.

        Returns its bytes, and their SHA-256 in hex.
        """

    def remove(self, names: Iterable[str]) -> None:
        """Remove those of the files that are there, in this order; durable when this returns."""

    def cannot_read(self, name: str, error: OSError) -> OutputError:
        """One sentence about what could not be read."""


def storage_of(output: str, roots: Sequence[str] = ()) -> Storage:
    """The storage of an output in its canonical spelling; nothing is touched before its first call.

    `roots`: folders below which a folder is written and read, whatever is swapped for a link meanwhile; none: anywhere.
    """
    from embedstream.dataset.bucket import Bucket

    return Bucket(parse_object(output, "output")) if is_object(output) else Folder(Path(output), roots)


class Folder:
    """A folder on a disk."""

    quick_piece = None

    def __init__(self, folder: Path, roots: Sequence[str] = ()) -> None:
        self._folder = folder
        self._roots = roots or (os.sep,)
        self._read_roots = roots or (str(folder.absolute()),)  # above it, folders need not be readable

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def prepare(self) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"{self._folder}: is a file, not a folder: choose another output (-o)")
        try:
            make_beneath(self._roots, str(self._folder))
        except ValueError as error:
            raise self._outside(error) from error
        except OSError as error:
            there = next(folder for folder in self._folder.absolute().parents if folder.is_dir())
            raise cannot("write", self._folder, error, there) from error

    def prove_writable(self) -> None:
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            with self._opened() as folder:
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder))
                os.unlink(probe, dir_fd=folder)
        except OSError as error:
            raise cannot("write", self._folder, error, self._folder) from error

    def names(self) -> list[str]:
        try:
            with self._opened(self._read_roots) as folder:
                return sorted(os.listdir(folder))  # noqa: PTH208  (names are what is wanted)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise cannot("read", self._folder, error) from error

    def sizes(self) -> dict[str, int]:
        try:
            with self._opened(self._read_roots) as folder, os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise cannot("read", self._folder, error) from error

    def sha256(self, name: str) -> tuple[int, str]:
        path = self._folder / name
        try:
            with self._reading(name) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, "sha256")
                return file.tell(), digest.hexdigest()
        except OSError as error:
            raise cannot("read", path, error) from error

    def open(self, name: str) -> pa.NativeFile:
        try:
            with self._reading(name) as descriptor:
                return pa.OSFile(f"/dev/fd/{descriptor}", "rb")
        except OSError as error:
            raise self.cannot_read(name, error) from error

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            with self._reading(name) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise cannot("read", path, error) from error

    def write(self, name: str, pieces: Iterable[Readable]) -> tuple[int, str]:
        path = self._folder / name
        try:
            with self._opened() as folder:
                return write_durable(path, pieces, folder)
        except OSError as error:
            raise cannot("write", path, error) from error

    def remove(self, names: Iterable[str]) -> None:
        path = self._folder
        try:
            reach("shard.discarding")
            with self._opened() as folder:
                for name in names:
                    path = self._folder / name
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
                sync_folder(folder)
            reach("shard.discarded")
        except OSError as error:
            raise cannot("remove", path, error) from error

    @contextlib.contextmanager
    def _opened(self, roots: Sequence[str] = ()) -> Iterator[int]:
        """A descriptor of the folder, which lies below the roots. Raises `OSError`; `OutputError` if it does not."""
        try:
            folder = open_beneath(roots or self._roots, str(self._folder), os.O_RDONLY | os.O_DIRECTORY)
        except ValueError as error:
            raise self._outside(error) from error
        try:
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[int]:
        """A descriptor of a file. Raises `OSError`; `OutputError` if it is none, a link out of the folder, or outside
        the roots.
        """
        path = self._folder / name
        refuse_special(path)
        folder, flags = str(self._folder.absolute()), os.O_RDONLY | os.O_NONBLOCK
        try:
            # A named pipe that is put there just now is not waited for.
            descriptor = open_beneath(self._read_roots, os.path.join(folder, name), flags, folder)  # noqa: PTH118
        except ValueError as error:
            raise OutputError(
                f"{path}: cannot read: is a link that leads out of the dataset's folder, or of what may be read: put "
                f"the file itself there"
            ) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _outside(self, error: ValueError) -> OutputError:
        return OutputError(f"{self._folder}: {error}: somebody has put a link there")

    def cannot_read(self, name: str, error: OSError) -> OutputError:
        return cannot("read", self._folder / name, error)
