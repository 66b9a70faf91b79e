"""Sources that are open: files, pipes and objects, looked into once and handed on to their first reading."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
from abc import abstractmethod
from collections.abc import Callable
from io import FileIO, IOBase
from typing import Generic, Protocol, TypeVar, cast

import pyarrow as pa

from embedstream.corpus.parts import Part
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.records import PartContent
from embedstream_producer.plain import ByteStream, PlainStream

log = logging.getLogger("embedstream.corpus")

MAGIC_BYTES = 8

Opener = Callable[[str, int], int]
"""As `open` takes it: from a path and flags to a descriptor."""


class Patches(dict[int, bytes]):
    """Bytes that a file is to have at some offsets, in place of its own."""

    def applied(self, begin: int, data: bytes) -> bytes:
        """What was read at `begin`, as it is to be."""
        for place, patch in self.items():
            at, past = max(begin, place), min(begin + len(data), place + len(patch))
            if at < past:
                data = data[: at - begin] + patch[at - place : past - place] + data[past - begin :]
        return data


class Source:
    """A source that is open, at its beginning. This one is a stream of the caller's."""

    piece_bytes = 1024 * 1024
    """What is well read at once."""
    quick = True
    """Whether small reads cost next to nothing."""
    size: int | None = None
    """Bytes of the file, None for a stream."""
    identity: object = None
    """What two names of one file have in common; None for a stream."""
    magic = b""
    """The first bytes of what can be read at any place."""
    warning = ""
    """What is wrong with it and did no harm; known once it is read to its end."""
    patches: Patches | None = None
    """What `file` gives in place of what lies there; None: a stream."""

    def __init__(self, label: str, stream: ByteStream) -> None:
        self.label = label
        self.stream = stream

    def starts_with(self, magic: bytes) -> bool:
        """Whether it is of a format that has to be read at any place. Never a stream, nor what is compressed."""
        return self.magic.startswith(magic)

    @functools.cached_property
    def plain(self) -> PlainStream:
        """For reading from the beginning to the end. Raises `InputError`, with the source closed."""
        return PlainStream(self.stream, self.label)

    def file(self) -> pa.NativeFile:
        """For reading at any place; what fails in reading it is an `OSError` for `cannot_read`."""
        return pa.PythonFile(cast("IOBase", self.stream), "r")

    def check_unchanged(self) -> None:
        """Raise `InputError` if what was read at any place may not be what lies there now. Never of a stream."""

    def cannot_read(self, error: OSError) -> InputError:
        """One sentence about what could not be read."""
        if error.strerror:
            return InputError(f"{self.label}: cannot be read ({error.strerror})")
        why = str(error).partition("\n")[0]  # Arrow's own, of what it found in the file
        return InputError(f"{self.label}: cannot be read ({why}): make or fetch the file again")

    def changed(self) -> InputError:
        """Of a source that was not the same to its end."""
        return InputError(f"{self.label}: was changed or replaced while it was read: run the same command again")

    def close(self) -> None:
        """Nothing: who opened the stream may go on with it."""


class _Patched(FileIO):
    """A file, but for a few bytes in it."""

    def __init__(self, path: str, opener: Opener | None) -> None:
        super().__init__(path, "rb", opener=opener)
        self.patches = Patches()

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self.tell() if self.patches else 0
        return self.patches.applied(begin, super().read(size))


class FileSource(Source):
    """A file on a disk, or a pipe that has a name."""

    def __init__(self, path: str, label: str, opener: Opener | None) -> None:
        """Raises `InputError`."""
        self.label = label
        try:
            # Not by `Path`, which knows no opener.
            raw = _Patched(path, opener)
        except FileNotFoundError:
            raise InputError(f"{label}: no such file") from None
        except IsADirectoryError:
            raise InputError(f"{label}: is a folder: name the files in it ({label.rstrip('/')}/*)") from None
        except OSError as error:
            raise self.cannot_read(error) from error
        except ValueError as error:
            raise InputError(f"{label}: cannot be read ({error})") from error
        super().__init__(label, raw)
        self.patches = raw.patches
        self._raw = raw
        self._state = state = os.fstat(raw.fileno())
        if stat.S_ISREG(state.st_mode):
            self.size = state.st_size
            self.identity = state.st_dev, state.st_ino
            try:
                self.magic = os.pread(raw.fileno(), MAGIC_BYTES, 0)
            except OSError as error:
                raw.close()
                raise self.cannot_read(error) from error

    def check_unchanged(self) -> None:
        # Another file of its name does not count: this one stays open.
        now = os.fstat(self._raw.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._state.st_size, self._state.st_mtime_ns):
            raise self.changed()

    def close(self) -> None:
        self.stream.close()


def sum_of(file: pa.NativeFile, source: Source) -> PartContent:
    """All bytes of a file that is open and was read at any place. Raises `OSError`, and `InputError` if it changed."""
    digest = hashlib.sha256()
    if source.patches:
        source.patches.clear()
    file.seek(0)
    while (piece := file.read_buffer(source.piece_bytes)).size:
        digest.update(piece)
    source.check_unchanged()
    return PartContent(file.tell(), digest.hexdigest())


def rest_of(plain: PlainStream, source: Source) -> PartContent:
    """All bytes of a source, of which some may be left to be read. Raises `InputError`."""
    while plain.read(source.piece_bytes):
        pass
    source.warning = plain.warning
    return PartContent(None if source.size is None else plain.position, plain.sha256)


class NothingUsable(InputError):
    """The first rows of a part are all refused because fields or format are not the expected ones."""


class _Closes(Protocol):
    def close(self) -> None: ...


Begun = TypeVar("Begun", bound=_Closes)


class SourcePart(Part, Generic[Begun]):
    """A part that is opened once: to be checked, for advice, and for its first reading. `Begun`: what is open then."""

    _warned = False

    def __init__(self, index: int, name: str, source: Source, again: Callable[[], Source]) -> None:
        """Look into `source`. `again` opens it anew, unless it is a stream.

        Raises:
            InputError: it cannot be read.
        """
        super().__init__(index, name, source.label, source.size, once=source.size is None)
        self.identity = source.identity
        self._again = again
        self._begun: Begun | None = self._begin(source)

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether it has no records."""

    @abstractmethod
    def hint(self, spec: JobSpec) -> str | None:
        """A sentence of advice from how the part begins; the types of kept columns are known then, too.

        Raises:
            NothingUsable: all that was looked at is refused.
            InputError: columns that the job needs are not there, or of a type that cannot be used; or no row of the
                first part has a field that the job names.
        """

    def read_content(self, on_position: Callable[[int], None]) -> PartContent | None:
        if self.once:
            return None
        source = self._again()
        try:
            digest, size = hashlib.sha256(), 0
            while piece := source.stream.read(source.piece_bytes):
                digest.update(piece)
                size += len(piece)
                on_position(size)
        except OSError as error:
            raise source.cannot_read(error) from error
        finally:
            source.close()
        return PartContent(size, digest.hexdigest())

    def _warn(self, source: Source) -> None:
        """Log what is wrong with a source that was read to its end, once."""
        if source.warning and not self._warned:
            self._warned = True
            log.warning("%s: %s", self.label, source.warning)

    def release(self) -> None:
        """Close what is open until it is needed, if it can be opened again."""
        if self._begun is not None and not self.once:
            self._begun.close()
            self._begun = None

    @abstractmethod
    def _begin(self, source: Source) -> Begun:
        """Closes the source if it raises."""

    def _open(self) -> Begun:
        """What is open, at its beginning. It stays for `_take`."""
        if self._begun is None:
            if self.once:
                raise InputError(f"{self.label}: cannot be read a second time: save it in a file and submit that")
            self._begun = self._begin(self._again())
        return self._begun

    def _take(self) -> Begun:
        """The same for who reads and closes it."""
        begun, self._begun = self._open(), None
        return begun
