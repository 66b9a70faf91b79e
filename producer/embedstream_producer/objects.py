"""Objects in S3 as input: read in large pieces, and found to be the same from beginning to end."""

from __future__ import annotations

from io import IOBase
from typing import cast

import pyarrow as pa

from embedstream.dataset.objects import ObjectAddress, explain_object, file_system
from embedstream.errors import InputError
from embedstream_producer.sources import MAGIC_BYTES, Patches, Source

READ_BYTES = 8 * 1024 * 1024
"""Asked for at once: each request costs tens of milliseconds."""

FIRST_BYTES = 256 * 1024
"""Asked for to see what an object is; those that have no more are read by that."""


class ObjectSource(Source):
    """An object that is open: one request tells its size and version, another one brings its first bytes."""

    piece_bytes = READ_BYTES
    quick = False
    size: int

    def __init__(self, address: ObjectAddress, label: str) -> None:
        """Raises `InputError`: it is not there, or cannot be read."""
        super().__init__(label, self)
        self._address = address
        try:
            self._file = self._look()
            self._version = self._file.metadata()
            self._first = self._file.read(FIRST_BYTES)
        except OSError as error:
            raise self.cannot_read(error) from error
        self.size = self._file.size()
        self.identity = address.url
        self.magic = self._first[:MAGIC_BYTES]
        self._rest = pa.BufferedInputStream(self._file, READ_BYTES)
        self._checked = False

    def file(self) -> pa.NativeFile:
        whole = pa.BufferReader(self._first) if self.size == len(self._first) else self._file
        patched = _Patched(whole)
        self.patches = patched.patches
        return pa.PythonFile(cast("IOBase", patched), "r")

    def read(self, size: int, /) -> bytes:
        """The next bytes, from the beginning. Raises `InputError`, also at the end of an object that was replaced."""
        data, self._first = self._first[:size], self._first[size:]
        if not data:
            try:
                data = self._rest.read(size)
            except OSError as error:
                raise self.cannot_read(error) from error
        if not data and not self._checked:
            self.check_unchanged()
            self._checked = True
        return data

    def check_unchanged(self) -> None:
        # Pieces of another object do not fit those read before.
        try:
            with self._look() as now:
                unchanged = now.metadata() == self._version
        except OSError as error:
            raise self.cannot_read(error) from error
        if not unchanged:
            raise self.changed()

    def cannot_read(self, error: OSError) -> InputError:
        return InputError(f"{self.label}: cannot be read: {explain_object(self._address, error)}")

    def close(self) -> None:
        self._file.close()

    def _look(self) -> pa.NativeFile:
        return file_system(self._address).open_input_file(self._address.path)


class _Patched:
    """An object that is open, but for a few bytes in it."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self.patches = Patches()
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int) -> bytes:
        begin = self._file.tell()
        return self.patches.applied(begin, self._file.read(size))
