"""The corpus of a job: its files, checked before a job is made, and each of them as blocks."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from itertools import chain, islice
from typing import Protocol

import pyarrow as pa

from embedstream.corpus.cutting import cut_part, enter_ids
from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.corpus.records import Outcome, Record, RecordReader
from embedstream.dataset.objects import is_object, parse_object
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, Refusal
from embedstream.queue.refusals import Code
from embedstream.records import PartContent
from embedstream_producer.lines import ByteStream, LineStream
from embedstream_producer.objects import ObjectSource
from embedstream_producer.parquet_part import MAGIC, ParquetPart

STDIN = "-"

ROWS_AT_ONCE = 1024
"""Most rows judged before their ids are looked up; `LineStream` bounds their bytes."""

PATIENCE_SECONDS = 1.0
"""How long a source's first record may take before somebody is told that it is waited for."""

SAMPLE_ROWS = 100
"""First rows by which `FilePart.hint` judges a file."""

_HOPELESS = frozenset({Code.INVALID_JSON, Code.NOT_UTF8, Code.NOT_AN_OBJECT, Code.MISSING_ID, Code.MISSING_FIELD})


class CorpusPart(Protocol):
    """One input of a corpus."""

    index: int
    source: str
    """As the user typed it."""
    name: str
    """What stands for this part in `JobSpec.parts`."""
    label: str
    """What stands for it in messages."""
    size: int | None
    """Bytes of the file, None for a stream."""
    identity: object
    """What two names of one file have in common; None for a stream."""
    content: PartContent | None
    """What `blocks` read when it last came to its end."""

    def blocks(
        self,
        spec: JobSpec,
        duplicates: DuplicateIndex,
        on_refusal: Callable[[Refusal], None] | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> Iterator[Block]: ...

    def ids(self, spec: JobSpec, duplicates: DuplicateIndex) -> Iterator[list[tuple[int, Position]]]: ...

    def hint(self, spec: JobSpec) -> str | None: ...


class FilePart:
    """Lines of JSON: a file, an object, or a stream that can be read only once (standard input, a named pipe)."""

    def __init__(
        self,
        index: int,
        source: str,
        name: str,
        raw: ByteStream,
        again: Callable[[], ByteStream] | None = None,
        size: int | None = None,
        identity: object = None,
    ) -> None:
        """Look for its first record in `raw`, which is open. `again` opens it anew; None: it can be read only once.

        Raises:
            InputError: it cannot be read, or has no records.
        """
        self.index = index
        self.source = source
        """As the user typed it."""
        self.name = name
        self.label = "standard input" if source == STDIN else source
        self.size = size
        self.identity = identity
        self.content: PartContent | None = None
        self._again = again
        head = _Head(LineStream(raw, self.label))
        self._head = None if again else head
        """The beginning of a stream, until it is read."""
        if again:
            head.stream.close()

    def blocks(
        self,
        spec: JobSpec,
        duplicates: DuplicateIndex,
        on_refusal: Callable[[Refusal], None] | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> Iterator[Block]:
        """Read the part from its beginning, as blocks: the same ones each time, as long as the file stays as it is.

        `on_refusal` is told of every refused row; `on_position` how many bytes of the file are read, to compare with
        `size`.

        Raises:
            InputError: the file cannot be read to its end, or this is a stream that was read before.
        """
        head = self._open()
        try:
            outcomes = _judge_all(RecordReader(spec), head, on_position)
            yield from cut_part(self.index, outcomes, spec, duplicates, on_refusal)
            size = None if self.size is None else head.stream.position
            self.content = PartContent(size, head.stream.sha256)
        finally:
            self._close(head)

    def ids(self, spec: JobSpec, duplicates: DuplicateIndex) -> Iterator[list[tuple[int, Position]]]:
        """Read the part for nothing but its ids, which decide about those of later parts; see `enter_ids`.

        Raises as `blocks` does.
        """
        head = self._open()
        try:
            yield from enter_ids(self.index, _judge_all(RecordReader(spec), head, None), duplicates)
        finally:
            self._close(head)

    def hint(self, spec: JobSpec) -> str | None:
        """A sentence of advice from the first rows: all are refused because fields or format are not the expected ones,
        or none has a field that the job keeps.
        """
        if self._head is not None:
            head = self._head
        else:
            head = self._open()
            self._close(head)
        outcomes = list(islice(_judge(RecordReader(spec), head.row, head.lines), SAMPLE_ROWS))
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal) and outcome.code in _HOPELESS]
        if len(refusals) < len(outcomes) or not refusals:
            return self._keep_hint(spec, [outcome for outcome in outcomes if isinstance(outcome, Record)])
        code, _ = Counter(refusal.code for refusal in refusals).most_common(1)[0]
        first = next(refusal for refusal in refusals if refusal.code == code)
        which = f"the first {len(refusals)} rows are all" if len(refusals) > 1 else "the first row is"
        more = "" if code in (Code.MISSING_ID, Code.MISSING_FIELD) else "; a corpus has one JSON object per line"
        return f"{self.label}: {which} refused: line {first.row + 1}: {first.message}{more}"

    def _keep_hint(self, spec: JobSpec, records: Sequence[Record]) -> str | None:
        absent = [name for at, name in enumerate(spec.keep) if all(record.kept[at] is None for record in records)]
        if not absent or not records:
            return None
        which = f"none of the first {len(records)} rows has" if len(records) > 1 else "the first row does not have"
        return f"{self.label}: {which} {' or '.join(absent)}, which --keep names"

    def _open(self) -> _Head:
        if self._again is not None:
            return _Head(LineStream(self._again(), self.label))
        if self._head is None:
            raise InputError(f"{self.label}: cannot be read a second time: save it in a file and submit that")
        head, self._head = self._head, None
        return head

    def _close(self, head: _Head) -> None:
        if self.source != STDIN:
            head.stream.close()


Opener = Callable[[str, int], int]
"""As `open` takes it: from a path and flags to a descriptor."""


class _LocalFile:
    """A file on a disk, for reading from its beginning or at any place."""

    piece_bytes = 1024 * 1024
    quick = True

    def __init__(self, path: str, label: str, opener: Opener | None) -> None:
        self._path = path
        self._label = label
        self._opener = opener

    def stream(self) -> FileIO:
        try:
            # Not by `Path`, which knows no opener.
            return open(self._path, "rb", buffering=0, opener=self._opener)
        except FileNotFoundError:
            raise InputError(f"{self._label}: no such file") from None
        except IsADirectoryError:
            raise InputError(
                f"{self._label}: is a folder: name the files in it ({self._label.rstrip('/')}/*)"
            ) from None
        except OSError as error:
            raise self.cannot_read(error) from error
        except ValueError as error:
            raise InputError(f"{self._label}: cannot be read ({error})") from error

    def file(self) -> pa.NativeFile:
        return pa.PythonFile(self.stream(), "r")

    def check_unchanged(self) -> None:
        """Nothing: an open file stays what it is when its name is given to another."""

    def cannot_read(self, error: OSError) -> InputError:
        if error.strerror:
            return InputError(f"{self._label}: cannot be read ({error.strerror})")
        why = str(error).partition("\n")[0]  # Arrow's own, of what it found in the file
        return InputError(f"{self._label}: cannot be read ({why}): make or fetch the file again")


def part_name(source: str) -> str:
    """What stands for a source in `JobSpec.parts`: a file's absolute path, an object's canonical address, or `-`.

    Raises:
        UsageError: an address that cannot be used.
    """
    if source == STDIN:
        return STDIN
    if is_object(source):
        return parse_object(source, "corpus").url
    return os.path.abspath(source)  # noqa: PTH100  (keeps symbolic links)


def open_part(index: int, source: str, stdin: ByteStream | None = None, opener: Opener | None = None) -> CorpusPart:
    """A source as the part that it is by its first bytes: Parquet, or lines of JSON.

    `stdin`: what `-` is, by default the process's own. `opener`: opens files, each time that one is read.

    Raises:
        InputError: it cannot be read, or has no records.
        UsageError: an address that cannot be used.
    """
    name = part_name(source)
    if source == STDIN:
        return FilePart(index, source, name, _own_stdin() if stdin is None else stdin)
    if is_object(source):
        found = ObjectSource(parse_object(source, "corpus"), source)
        with contextlib.closing(found.file()) as file:
            if file.read(len(MAGIC)) == MAGIC:
                return ParquetPart(index, source, name, found.size, name, found)
        return FilePart(index, source, name, found.stream(), found.stream, found.size, name)
    local = _LocalFile(name, source, opener)
    raw = local.stream()
    state = os.fstat(raw.fileno())
    if not stat.S_ISREG(state.st_mode):
        return FilePart(index, source, name, raw)
    identity = state.st_dev, state.st_ino
    if os.pread(raw.fileno(), len(MAGIC), 0) == MAGIC:
        raw.close()
        return ParquetPart(index, source, name, state.st_size, identity, local)
    return FilePart(index, source, name, raw, local.stream, state.st_size, identity)


def check_sources(
    sources: Sequence[str], stdin: ByteStream | None = None, notice: Callable[[str], None] | None = None
) -> list[CorpusPart]:
    """The parts of a corpus, each opened once and found to have a record.

    `notice` is told, from another thread, of a source whose first record takes long: of a pipe nobody writes into, say.

    Raises:
        InputError: one cannot be read, or has no records.
        UsageError: no source, or one file is given twice.
    """
    if not sources:
        raise UsageError("no corpus given: name a file of JSON lines or Parquet, or - for standard input")
    parts: list[CorpusPart] = []
    seen: dict[object, str] = {}
    for index, source in enumerate(sources):
        if source in sources[:index]:
            raise UsageError(f"{source}: given twice")
        with _telling(source, notice):
            part = open_part(index, source, stdin)
        if part.identity in seen:
            raise UsageError(f"{source}: is the same file as {seen[part.identity]}")
        seen[part.identity] = source
        parts.append(part)
    return parts


@contextlib.contextmanager
def _telling(source: str, notice: Callable[[str], None] | None) -> Iterator[None]:
    if notice is None:
        yield
        return
    label = "standard input" if source == STDIN else source
    timer = threading.Timer(PATIENCE_SECONDS, notice, [f"{label}: waiting for its first record"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def total_bytes(parts: Iterable[CorpusPart]) -> int | None:
    """Bytes to read, for progress; None if a stream is among the parts."""
    sizes = [part.size for part in parts]
    return None if None in sizes else sum(size for size in sizes if size is not None)


class _Head:
    """A stream of lines, read up to its first record."""

    def __init__(self, stream: LineStream) -> None:
        self.stream = stream
        self.row = 0
        """Of the first of `lines`; nothing but blank lines came before."""
        self.lines: list[bytes] = []
        self._rest = stream.batches()
        try:
            for row, lines in self._rest:
                if not all(map(_is_blank, lines)):
                    self.row, self.lines = row, lines
                    break
        except InputError:
            stream.close()
            raise

    def batches(self) -> Iterator[tuple[int, list[bytes]]]:
        first, self.lines = self.lines, []
        return chain([(self.row, first)], self._rest)


def _judge_all(
    reader: RecordReader, head: _Head, on_position: Callable[[int], None] | None
) -> Iterator[Sequence[Outcome]]:
    for row, lines in head.batches():
        for start in range(0, len(lines), ROWS_AT_ONCE):
            yield list(_judge(reader, row + start, lines[start : start + ROWS_AT_ONCE]))
        if on_position is not None:
            on_position(head.stream.position)


def _judge(reader: RecordReader, row: int, lines: Iterable[bytes]) -> Iterator[Outcome]:
    """How the lines from `row` on end; blank ones only count as rows."""
    return (reader.line(at, line) for at, line in enumerate(lines, row) if not _is_blank(line))


def _own_stdin() -> ByteStream:
    if sys.stdin is None:
        raise InputError("standard input: is closed")
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)  # unbuffered, so that rows go out as they come in


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()
