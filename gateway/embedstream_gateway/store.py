"""Uploaded files and batches, as folders below one root: each is whole or not there, whichever process dies.

`files/ID/` holds `file.json` and `content`; `batches/ID/` what `batch_records` names. Any number of gateways may share
a root.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, TypeVar

import msgspec

from embedstream.dataset.files import cannot, sync_folder
from embedstream.errors import OutputError
from embedstream.server.foreign import leaving_out

T = TypeVar("T")

Purpose = Literal["batch", "batch_output"]

_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")
_META, CONTENT = "file.json", "content"
_HIDDEN = "."
"""What begins so is not whole yet, or is being removed."""

ABANDONED_SECONDS = 86_400
"""An upload of which nothing was heard for so long is removed."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file, with OpenAI's names."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    expires_at: int | None = None


def new_id(prefix: Literal["file-", "batch_"]) -> str:
    return prefix + secrets.token_hex(12)


def is_id(text: str, prefix: Literal["file-", "batch_"]) -> bool:
    """Whether it is an id as `new_id` makes them, and so a name of one folder."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


class Store:
    """What lies below a root. All calls block; each raises `OutputError` where the disk refuses."""

    def __init__(self, root: Path, days: float) -> None:
        """`days`: how long files are kept."""
        self.files = root / "files"
        self.batches = root / "batches"
        self._days = days

    def prepare(self) -> None:
        """Make the folders."""
        with _explained("create", self.files):
            for folder in (self.files, self.batches):
                folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def writing(self, filename: str, purpose: Purpose, id: str = "", created: float | None = None) -> Iterator[NewFile]:
        """A file to be written; it is there once `NewFile.finish` returns, and otherwise leaves nothing.

        `id`: that of an earlier try, which wrote the same; it is kept if it is there.
        """
        name = id or new_id("file-")
        folder = self.files / f"{_HIDDEN}{name}.{secrets.token_hex(4)}"
        with _explained("write", folder):
            folder.mkdir()
            try:
                with (folder / CONTENT).open("xb") as file:
                    yield NewFile(
                        self, folder, file, name, filename, purpose, time.time() if created is None else created
                    )
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # not there any more, once it is finished

    def expiry(self, created: float) -> int:
        """When a file is removed, in Unix seconds."""
        return int(created + 86_400 * self._days)

    def get(self, id: str) -> StoredFile | None:
        """A file; None if there is none of this id."""
        if not is_id(id, "file-"):
            return None
        return read_json(self.files / id / _META, StoredFile)

    def content(self, id: str) -> Path:
        """Where the content of a file lies. `id`: of a file that `get` gave."""
        return self.files / id / CONTENT

    def all(self) -> list[StoredFile]:
        """All files, the newest first. One whose record is damaged is left out, and logged once."""
        found: list[StoredFile] = []
        for name in _names(self.files, "file-"):
            with leaving_out(name):
                found += filter(None, [self.get(name)])
        return sorted(found, key=lambda file: (-file.created_at, file.id))

    def delete(self, id: str) -> bool:
        """Remove a file. Whether it was there."""
        return self.get(id) is not None and remove(self.files / id)

    def sweep(self, now: float) -> None:
        """Remove files whose time is over, and what was being made or removed by a process that died."""
        for file in self.all():
            if file.expires_at is not None and file.expires_at < now:
                self.delete(file.id)
        with _explained("read", self.files):
            for folder in (*self.files.iterdir(), *self.batches.iterdir()):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    if folder.name.startswith(_HIDDEN) and _touched(folder) < now - ABANDONED_SECONDS:
                        shutil.rmtree(folder, ignore_errors=True)

    def batch_names(self) -> list[str]:
        """Ids of all batches."""
        return _names(self.batches, "batch_")


class NewFile:
    """A file that is being written."""

    def __init__(
        self, store: Store, folder: Path, file: IO[bytes], id: str, filename: str, purpose: Purpose, created: float
    ) -> None:
        self._store, self._folder, self._file = store, folder, file
        self._id, self._filename, self._purpose, self._created = id, filename, purpose, created
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)

    def finish(self, filename: str | None = None) -> StoredFile:
        """Make it durable, and give it its name."""
        made = StoredFile(
            id=self._id,
            bytes=self.size,
            created_at=int(self._created),
            filename=filename or self._filename,
            purpose=self._purpose,
            expires_at=self._store.expiry(self._created),
        )
        self._file.flush()
        os.fsync(self._file.fileno())
        write_json(self._folder / _META, made)
        try:
            self._folder.rename(self._store.files / self._id)
        except OSError:
            if (there := self._store.get(self._id)) is None:
                raise
            return there  # an earlier try, or another gateway, was at the same
        _sync(self._store.files)
        return made


def read_json(path: Path, kind: type[T]) -> T | None:
    """What a file of ours holds; None if there is none. Raises `OutputError` if it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot("read", path, error) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OutputError(f"{path}: is damaged ({error}): remove its folder") from error


def write_json(path: Path, value: object) -> None:
    """Put a value into a file that is whole or not there, and survives a power cut."""
    temporary = path.with_name(f"{_HIDDEN}{path.name}.{secrets.token_hex(4)}")
    with _explained("write", path):
        try:
            with temporary.open("xb") as file:
                file.write(msgspec.json.encode(value))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def remove(folder: Path) -> bool:
    """Remove a folder, at once for all who look. Whether it was there."""
    gone = folder.with_name(f"{_HIDDEN}{folder.name}.{secrets.token_hex(4)}")
    with _explained("remove", folder):
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
    return True


def _names(folder: Path, prefix: Literal["file-", "batch_"]) -> list[str]:
    with _explained("read", folder):
        return sorted(path.name for path in folder.iterdir() if is_id(path.name, prefix))


def _touched(folder: Path) -> float:
    """When anything was last written in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_folder(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot(verb, path, error) from error
