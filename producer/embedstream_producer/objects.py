"""Objects in S3 as input: read as a stream, in large pieces, and found to be the same from beginning to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedstream.dataset.objects import ObjectAddress, explain_object, file_system
from embedstream.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import S3FileSystem

READ_BYTES = 8 * 1024 * 1024
"""Asked for at once: each request costs tens of milliseconds."""


class ObjectSource:
    """One object."""

    piece_bytes = READ_BYTES
    quick = False

    def __init__(self, address: ObjectAddress, label: str) -> None:
        """Raises `InputError`: it is not there, or cannot be read."""
        self._address = address
        self._label = label
        self._version = self._look()
        self.size = self._version[0]

    def stream(self) -> ObjectStream:
        """From the beginning. Raises `InputError`."""
        try:
            opened = self._system.open_input_stream(self._address.path, compression=None, buffer_size=READ_BYTES)
        except OSError as error:
            raise self.cannot_read(error) from error
        return ObjectStream(self, opened)

    def file(self) -> pa.NativeFile:
        """For reading at any place; what fails in reading it is an `OSError` for `cannot_read`. Raises `InputError`."""
        try:
            return self._system.open_input_file(self._address.path)
        except OSError as error:
            raise self.cannot_read(error) from error

    def check_unchanged(self) -> None:
        """Raise `InputError` if another object lies there now: its pieces do not fit those read before."""
        if self._look() != self._version:
            raise InputError(f"{self._label}: was replaced while it was read: run the same command again")

    def cannot_read(self, error: OSError) -> InputError:
        """One sentence about what could not be read."""
        return InputError(f"{self._label}: cannot be read: {explain_object(self._address, error)}")

    def _look(self) -> tuple[int, int | None]:
        """Size, and when it was written."""
        # Not at the top: see `embedstream.dataset.objects`.
        from pyarrow.fs import FileType

        try:
            info = self._system.get_file_info(self._address.path)
        except OSError as error:
            raise self.cannot_read(error) from error
        if info.type != FileType.File:
            missing = FileNotFoundError(self._address.path)
            raise self.cannot_read(missing) from missing
        return info.size, info.mtime_ns

    @property
    def _system(self) -> S3FileSystem:
        return file_system(self._address)


class ObjectStream:
    """The bytes of an object, one after the other."""

    def __init__(self, source: ObjectSource, opened: pa.NativeFile) -> None:
        self._source = source
        self._opened = opened

    def read(self, size: int, /) -> bytes:
        try:
            data = self._opened.read(size)
        except OSError as error:
            raise self._source.cannot_read(error) from error
        if not data:
            self._source.check_unchanged()
        return data

    def close(self) -> None:
        self._opened.close()
