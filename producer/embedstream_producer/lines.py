"""Bytes -> lines, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError
from embedstream_producer.plain import READ_BYTES, PlainStream

_BOM = b"\xef\xbb\xbf"
_BOMS = re.compile(rb"^(?:\xef\xbb\xbf)+", re.M)
_MARKS = bytes(ord(" " if bytes([byte]).isspace() else "x") for byte in range(256))
"""For `bytes.translate`: where lines are not blank."""
_SHORT_LINE = 8
"""Bytes: no record has fewer, so where lines have fewer on average many are blank, or bad."""
_MOSTLY = 16
"""So many lines for each byte that is not blank are mostly blank."""


class LineStream:
    """The lines of one source."""

    unit = "line"

    def __init__(
        self, plain: PlainStream, label: str, *, longest: int = LONGEST_LINE_BYTES, read_bytes: int = READ_BYTES
    ) -> None:
        """Read `plain`, which is closed by `close`; `label` names it in errors."""
        self.plain = plain
        self._label = label
        self._longest = longest
        self._read_bytes = min(read_bytes, longest)
        self._line = 1
        """The line that comes next."""
        self._tail = b""
        plain.place = lambda: f", near line {self._line:,}"

    def batches(self) -> Iterator[tuple[int, list[bytes]]]:
        """Consecutive lines without their newlines, some at a time, with the place of the first, from 0.

        Where blank lines abound they are left out, so places tell of them. A line longer than the bound comes cut to
        one byte more than the bound, so its length tells.

        Raises:
            InputError: the source cannot be read to its end, or is no JSON Lines at all.
        """
        tail, in_long_line, judged = b"", False, False
        chunk = self.plain.read(self._read_bytes)
        while chunk:
            if in_long_line:
                _, newline, chunk = chunk.partition(b"\n")
                in_long_line = not newline
            if not in_long_line:
                for place, lines in self._cut(tail + chunk):
                    judged = judged or self._judge_first(lines)
                    yield place, lines
                tail = self._tail
                if len(tail) > self._longest:
                    judged = judged or self._judge_first([tail])
                    yield self._line - 1, [tail[: self._longest + 1]]
                    self._line += 1
                    tail, in_long_line = b"", True
            chunk = self.plain.read(self._read_bytes)
        if tail:
            if not judged:
                self._judge_first([tail])
            yield self._line - 1, [tail]

    def _cut(self, data: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """The whole lines of the data, as `batches` gives them; what follows the last is the `_tail`."""
        # One byte is found much faster than several. Within are marks where files were put together.
        if _BOM[:1] in data and (data.startswith(_BOM) or b"\n" + _BOM in data):
            data = _BOMS.sub(b"", data)
        count = data.count(b"\n")
        marks = data.translate(_MARKS) if count * _SHORT_LINE > len(data) else b""
        if count < _MOSTLY * marks.count(b"x") or not marks:
            lines = data.split(b"\n")
            self._tail = lines.pop()
            if len(data) > self._longest:
                lines = [line[: self._longest + 1] for line in lines]
            if lines:
                yield self._line - 1, lines
            self._line += count
            return
        # No list of a million empty lines is made.
        end, at = data.rfind(b"\n") + 1, 0
        self._tail = data[end:]
        while (found := marks.find(b"x", at, end)) >= 0:
            self._line += data.count(b"\n", at, found)
            begin, at = data.rfind(b"\n", 0, found) + 1, data.index(b"\n", found)
            yield self._line - 1, [data[begin : min(at, begin + self._longest + 1)]]
        self._line += data.count(b"\n", at)

    def close(self) -> None:
        self.plain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge_first(self, lines: list[bytes]) -> bool:
        """Whether there is a line with something on it; raises `InputError` if it begins another kind of JSON."""
        first = next((line for line in lines if line and not line.isspace()), None)
        if first is None:
            return False
        if first.lstrip().startswith(b"<"):
            raise InputError(f"{self._label}: is HTML or XML, not JSON Lines: fetch the data itself")
        if first.strip() == b"{":
            raise InputError(
                f"{self._label}: is JSON spread over lines, not JSON Lines (one object per line): "
                f"convert it (jq -c . spread.json > lines.jsonl)"
            )
        return True
