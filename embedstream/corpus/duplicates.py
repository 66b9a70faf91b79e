"""Finds ids that were used before, whatever the size of the corpus, in bounded memory.

An id is known by 128 bits of BLAKE2b, beside the position that used it first. New ids wait in a small dictionary; when
it is full they go, sorted, into a hash table in an unnamed temporary file: buckets of one page each, twice as many of
them whenever they hold 96 ids on average. A look-up costs one `pread`, mostly from the page cache. In memory stay the
dictionary and one byte per bucket (of some 70 ids).
"""

from __future__ import annotations

import os
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from embedstream.errors import OutputError, UsageError
from embedstream.temporary import temporary_folder

PENDING_IDS = 32_768
"""New ids held in memory: enough that one write serves several of them, at about 5 MB."""

_KEY = 16
_SLOT = 24  # key, then position
_PAGE = 4096
_SLOTS = _PAGE // _SLOT
_MEAN = 96  # ids per bucket at which the table grows: at 10 standard deviations' room a bucket hardly ever overflows
_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1
_GROW_PAGES = 64  # buckets read at once while growing
_FIRST_BITS = 8
_ABOVE_ALL = b"\xff" * (_SLOT + 1)


class Position(NamedTuple):
    """Where an id stands in the corpus."""

    part: int
    row: int


class DuplicateIndex:
    """The ids of one corpus, fed in the order of parts and rows. Its file vanishes with the process, however that ends.

    Reading a part again is harmless: a position that owns an id keeps it, so the verdicts are those of the first time.
    """

    def __init__(self, directory: Path | None = None, pending_ids: int = PENDING_IDS) -> None:
        """Keep the index on the disk of `directory` (None: the system's temporary folder).

        Raises:
            OutputError: no file can be made there.
        """
        self._directory = Path(temporary_folder()) if directory is None else directory
        self._pending_ids = pending_ids
        self._pending: dict[bytes, int] = {}
        self._stored = 0
        self._bits = _FIRST_BITS
        self._counts = array("B", bytes(1 << self._bits))
        self._file = self._new_file()

    def check(self, part: int, rows: Sequence[int], ids: Sequence[str]) -> list[Position | None]:
        """Enter the ids of some rows of a part; for each, the earlier position that has the same id, or None.

        Raises:
            OutputError: the index cannot be written or read.
        """
        try:
            return self._check(part, rows, ids)
        except OSError as error:
            raise self._failed(error) from error

    def _check(self, part: int, rows: Sequence[int], ids: Sequence[str]) -> list[Position | None]:
        if not 0 <= part < 1 << 24:
            raise UsageError(f"part {part}: a job has at most {1 << 24:,} parts")
        pending, counts = self._pending, self._counts
        shift, fd = 32 - self._bits, self._file.fileno()
        base = part << _ROW_BITS
        earlier: list[Position | None] = []
        for row, id in zip(rows, ids, strict=True):
            key = blake2b(id.encode(), digest_size=_KEY).digest()
            owner = pending.get(key)
            if owner is None:
                bucket = int.from_bytes(key[:4]) >> shift
                if count := counts[bucket]:
                    page = os.pread(fd, count * _SLOT, bucket * _PAGE)
                    at = page.find(key)
                    while at > 0 and at % _SLOT:  # the same bytes, but across two slots
                        at = page.find(key, at + 1)
                    if at >= 0:
                        owner = int.from_bytes(page[at + _KEY : at + _SLOT])
                if owner is None:
                    pending[key] = base + row
                    earlier.append(None)
                    if len(pending) >= self._pending_ids:
                        self._store()
                        pending, counts = self._pending, self._counts
                        shift, fd = 32 - self._bits, self._file.fileno()
                    continue
            earlier.append(None if owner == base + row else Position(owner >> _ROW_BITS, owner & _ROW_MASK))
        return earlier

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
        self._pending.clear()

    def __len__(self) -> int:
        """Distinct ids so far."""
        return self._stored + len(self._pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self._directory, buffering=0)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._directory}: cannot hold the index of ids, about 80 bytes each ({error.strerror}): "
            f"make room, or name another folder (TMPDIR)"
        )

    def _store(self) -> None:
        """Move the pending ids into the table."""
        slots = sorted(key + position.to_bytes(8) for key, position in self._pending.items())
        self._stored += len(slots)
        self._pending = {}
        while self._stored > _MEAN << self._bits:
            self._grow()
        while slots := self._append(slots):
            self._grow()

    def _append(self, slots: list[bytes]) -> list[bytes]:
        """Write sorted slots into their buckets; returns those from the first bucket on that has no room."""
        shift, counts, fd = 32 - self._bits, self._counts, self._file.fileno()
        done, end = 0, len(slots)
        while done < end:
            bucket = int.from_bytes(slots[done][:4]) >> shift
            above = ((bucket + 1) << shift).to_bytes(4) if bucket + 1 < len(counts) else _ABOVE_ALL
            stop = done + 1
            while stop < end and slots[stop] < above:
                stop += 1
            count = counts[bucket]
            if count + stop - done > _SLOTS:
                return slots[done:]
            _write(fd, b"".join(slots[done:stop]), bucket * _PAGE + count * _SLOT)
            counts[bucket] = count + stop - done
            done = stop
        return []

    def _grow(self) -> None:
        """Split every bucket in two by the next bit of its keys: bucket b becomes 2b and 2b + 1."""
        old, counts, bits = self._file, self._counts, self._bits + 1
        new, new_counts = self._new_file(), array("B", bytes(1 << bits))
        try:
            for first in range(0, len(counts), _GROW_PAGES):
                pages = os.pread(old.fileno(), _GROW_PAGES * _PAGE, first * _PAGE)
                split = bytearray(2 * _GROW_PAGES * _PAGE)
                for at in range(_GROW_PAGES):
                    bucket = first + at
                    start, middle = at * _PAGE, ((2 * bucket + 1) << (32 - bits)).to_bytes(4)
                    slots = [pages[i : i + _SLOT] for i in range(start, start + counts[bucket] * _SLOT, _SLOT)]
                    slots.sort()
                    cut = bisect_left(slots, middle)
                    for half, kept in enumerate((slots[:cut], slots[cut:])):
                        new_counts[2 * bucket + half] = len(kept)
                        split[2 * start + half * _PAGE : 2 * start + half * _PAGE + len(kept) * _SLOT] = b"".join(kept)
                _write(new.fileno(), split, 2 * first * _PAGE)
        except BaseException:
            new.close()
            raise
        old.close()
        self._file, self._counts, self._bits = new, new_counts, bits


def _write(fd: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of `data`: a nearly full disk takes only some of it before it refuses."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
