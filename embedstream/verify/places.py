"""Which rows of a corpus were seen, and a few numbers about each: memory of one bit a row, the numbers on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt

from embedstream.errors import OutputError
from embedstream.temporary import temporary_folder

Rows: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.uint64]

PAGE_BITS = 16
PAGE_ROWS = 1 << PAGE_BITS

_FEW_ROWS = PAGE_ROWS // 16
"""Of a page whose rows take less as numbers (uint16) than as bits."""


class Places:
    """A set of (part, row), in pages that exist only where rows do: bitmaps, or the numbers of few rows."""

    def __init__(self, most_pages: int) -> None:
        """`most_pages` bounds the memory that wrong row numbers can take."""
        self._most_pages = most_pages
        self._pages: dict[tuple[int, int], _Page] = {}

    def add(self, part: int, rows: Rows) -> tuple[Mask, Mask]:
        """Enter rows of a part, [n]; which of them were there before (or earlier in `rows`), and which have no room."""
        doubled, beyond = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
        if len(rows) > 1 and not (rows[1:] > rows[:-1]).all():
            order = np.argsort(rows, kind="stable")
            doubled[order[1:]] = rows[order[1:]] == rows[order[:-1]]
        for page, chosen, local in _paged(rows):
            held = self._pages.get((part, page))
            if held is None and (len(self._pages) >= self._most_pages or page < 0):
                beyond[chosen] = True
                continue
            there = np.zeros(PAGE_ROWS, np.bool_) if held is None else _spread(held)
            doubled[chosen] |= there[local]
            there[local] = True
            self._pages[part, page] = _packed(there)
        return doubled & ~beyond, beyond

    def has(self, part: int, rows: Rows) -> Mask:
        """Which of the rows of a part were entered, [n]."""
        found = np.zeros(len(rows), np.bool_)
        if self._pages:
            for page, chosen, local in _paged(rows):
                held = self._pages.get((part, page))
                if held is not None:
                    found[chosen] = _spread(held)[local]
        return found

    def remove(self, part: int, rows: Rows) -> Mask:
        """Take rows of a part out, [n]; which of them were there."""
        found = np.zeros(len(rows), np.bool_)
        for page, chosen, local in _paged(rows):
            held = self._pages.get((part, page))
            if held is not None:
                there = _spread(held)
                found[chosen] = there[local]
                there[local] = False
                self._pages[part, page] = _packed(there)
        return found

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        """All that is in the set: a part and some of its rows at a time."""
        for (part, page), held in sorted(self._pages.items()):
            rows = np.flatnonzero(_spread(held)).astype(np.int64)
            if len(rows):
                yield part, rows + (page << PAGE_BITS)


_Page: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""Bits, or the numbers of few rows."""


def _packed(there: Mask) -> _Page:
    if np.count_nonzero(there) < _FEW_ROWS:
        return np.flatnonzero(there).astype(np.uint16)
    return np.packbits(there)


def _spread(page: _Page) -> Mask:
    """Which rows of a page are there, [PAGE_ROWS]."""
    if page.dtype == np.uint8:
        return np.unpackbits(page.view(np.uint8)).view(np.bool_)
    there = np.zeros(PAGE_ROWS, np.bool_)
    there[page] = True
    return there


class PlaceNumbers:
    """A few 64-bit numbers for each (part, row), in a file that vanishes with the process."""

    def __init__(self, width: int) -> None:
        """Raises `OutputError` if no temporary file can be made."""
        self._width = width
        self._slots: dict[tuple[int, int], int] = {}
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=temporary_folder(), buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise _no_room(error) from error

    def put(self, part: int, rows: Rows, numbers: Numbers) -> None:
        """Keep `numbers` [n, width] of rows [n] of a part, replacing older ones. Raises `OutputError`."""
        for page, chosen, local in _paged(rows):
            first, last = int(local.min()), int(local.max())
            span = self._span(part, page, first, last + 1)
            span[local - first] = numbers[chosen]
            try:
                data, offset = span.tobytes(), self._offset(part, page, first)
                while data:
                    written = os.pwrite(self._file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
            except OSError as error:
                raise _no_room(error) from error

    def get(self, part: int, rows: Rows) -> Numbers:
        """The numbers [n, width] of rows [n] of a part; zeros for those that have none."""
        numbers = np.zeros((len(rows), self._width), np.uint64)
        for page, chosen, local in _paged(rows):
            if (part, page) in self._slots:
                first, last = int(local.min()), int(local.max())
                numbers[chosen] = self._span(part, page, first, last + 1)[local - first]
        return numbers

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _offset(self, part: int, page: int, first: int) -> int:
        slot = self._slots.setdefault((part, page), len(self._slots))
        return (slot * PAGE_ROWS + first) * self._width * 8

    def _span(self, part: int, page: int, first: int, end: int) -> Numbers:
        span = np.zeros((end - first, self._width), np.uint64)
        if (part, page) in self._slots:
            data = os.pread(self._file.fileno(), span.nbytes, self._offset(part, page, first))
            span.reshape(-1).view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        return span


def _paged(rows: Rows) -> Iterator[tuple[int, Mask | slice, Rows]]:
    """Rows by the page they are in: its number, which rows, and where in the page."""
    if not len(rows):
        return
    pages = rows >> PAGE_BITS
    if pages[0] == pages[-1] and (len(pages) < 3 or (pages == pages[0]).all()):
        yield int(pages[0]), slice(None), rows & (PAGE_ROWS - 1)
        return
    for page in np.unique(pages):
        chosen = pages == page
        yield int(page), chosen, rows[chosen] & (PAGE_ROWS - 1)


def _no_room(error: OSError) -> OutputError:
    return OutputError(
        f"{temporary_folder()}: cannot hold what is to be compared, some 20 bytes a row ({error.strerror}): "
        f"make room, or name another folder (TMPDIR)"
    )
