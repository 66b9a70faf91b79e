"""The corpus of a job: its files, checked before a job is made, and each of them as blocks."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from embedstream.corpus.advice import SAMPLE_ROWS, Sample
from embedstream.corpus.parts import Part
from embedstream.corpus.records import LONGEST_LINE_BYTES, Outcome, RecordReader
from embedstream.dataset.objects import is_object, parse_object
from embedstream.errors import InputError, UsageError
from embedstream.jobs import CorpusFormat, JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import HOPELESS, OF_THE_FORMAT, Code
from embedstream.terminal import is_utf8, printable
from embedstream_producer import arrow_part, csv_part, parquet_part
from embedstream_producer.arrow_part import ArrowPart
from embedstream_producer.csv_part import CsvPart
from embedstream_producer.expanding import STDIN, is_texts, texts_of
from embedstream_producer.hub import HubSource, is_hub, parse_hub
from embedstream_producer.json_array import ArrayStream
from embedstream_producer.lines import LineStream
from embedstream_producer.objects import ObjectSource
from embedstream_producer.parquet_part import ParquetPart
from embedstream_producer.plain import ByteStream
from embedstream_producer.sources import FileSource, NothingUsable, Opener, Source, SourcePart, rest_of
from embedstream_producer.texts_part import TextsPart

ROWS_AT_ONCE = 1024
"""Most rows judged before their ids are looked up; `LineStream` bounds their bytes."""

PATIENCE_SECONDS = 1.0
"""How long a source's first record may take before the user is told that it is waited for."""

MOST_OPEN = 16
"""Parts that stay open between their check and their first reading; each may hold 8 MiB of a long line. Those that
follow are opened again when it is their turn."""

MOST_HELD_BYTES = LONGEST_LINE_BYTES
"""Looked at in search of a row that the job can use, beyond the lines that come first."""


_OTHER_FIELDS: dict[str, str] = {
    Code.BAD_ID: "; --id-field takes another, --number-rows none",
    Code.TEXT_NOT_STRING: "; --text-field takes another",
}


class FilePart(SourcePart["_Head"]):
    """Lines of JSON: a file, an object, or a stream that can be read only once (standard input, a named pipe)."""

    stream: type[LineStream] | type[ArrayStream] = LineStream

    @property
    def empty(self) -> bool:
        return not self._open().held

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        reader = RecordReader(spec, self.index)
        for row, lines in self.lines(on_position):
            for start in range(0, len(lines), ROWS_AT_ONCE):
                yield list(_judge(reader, row + start, lines[start : start + ROWS_AT_ONCE]))

    def lines(self, on_position: Callable[[int], None] | None = None) -> Iterator[tuple[int, list[bytes]]]:
        """All lines, blank ones too, some at a time, with the row of the first. Raises as `outcomes` does."""
        with contextlib.closing(self._take()) as head:
            for row, lines in head.batches():
                yield row, lines
                if on_position is not None:
                    on_position(head.plain.position)
            self.content = rest_of(head.plain, head.source)
            self._warn(head.source)

    def hint(self, spec: JobSpec) -> str | None:
        self.kept_types = dict.fromkeys(spec.keep, "string")
        reader, outcomes, refusals = RecordReader(spec, self.index), list[Outcome](), list[Refusal]()
        rows: list[bytes] = []
        for row, lines in self._open().looked_at():
            rows += islice((line for line in lines if not _is_blank(line)), SAMPLE_ROWS - len(rows))
            outcomes += islice(_judge(reader, row, lines), SAMPLE_ROWS - len(outcomes))
            refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal) and outcome.code in HOPELESS]
            if len(refusals) < len(outcomes) or len(outcomes) == SAMPLE_ROWS:
                break
        if len(refusals) < len(outcomes) or not refusals:
            return self._lacking(spec, Sample(rows))
        code, _ = Counter(refusal.code for refusal in refusals).most_common(1)[0]
        first = next(refusal for refusal in refusals if refusal.code == code)
        which = f"the first {len(refusals)} rows are all" if len(refusals) > 1 else "the first row is"
        more = "; a corpus has one JSON object per line" if code in OF_THE_FORMAT else _OTHER_FIELDS.get(code, "")
        told = Sample(rows).advised(first, reader.ids)
        raise NothingUsable(f"{self.label}: {which} refused: {self.stream.unit} {first.row + 1}: {told}{more}")

    def _lacking(self, spec: JobSpec, sample: Sample) -> str | None:
        lacking = sample.lacking(spec)
        told = f"{self.label}: {lacking}"
        if lacking and self.index == 0 and not self.once:  # of a stream, only what has come by now is known
            raise InputError(told)
        return told if lacking else None

    def _begin(self, source: Source) -> _Head:
        return _Head(source, self.stream(source.plain, source.label))


class ArrayPart(FilePart):
    """The elements of a JSON array."""

    stream = ArrayStream


def part_name(source: str) -> str:
    """What stands for a source in `JobSpec.parts`: an absolute path, a canonical address, or `-`.

    Raises:
        UsageError: an address that cannot be used, or a path that is not UTF-8.
    """
    if source == STDIN:
        return STDIN
    if not source:
        raise UsageError("a corpus file's name is empty: was it meant to come from a variable that is not set?")
    if is_object(source):
        return parse_object(source, "corpus").url
    if is_hub(source):
        return parse_hub(source).url
    path = os.path.abspath(source)  # noqa: PTH100  (keeps symbolic links)
    if not is_utf8(path):
        raise UsageError(f"{printable(path)}: its name is not UTF-8: rename it, or name a link to it")
    return path


def open_part(
    index: int,
    source: str,
    stdin: ByteStream | None = None,
    opener: Opener | None = None,
    format: CorpusFormat | None = None,
    kind: type[SourcePart[Any]] | None = None,
) -> SourcePart[Any]:
    """A source as the part that it is by its format, or else by its first bytes. It stays open to be read.

    `stdin`: what `-` is, by default the process's own. `opener`: opens files, each time that one is read; folders are
    none then. `kind`: the part that it is, if it has no format of a corpus.

    Raises:
        InputError: it cannot be read.
        UsageError: an address that cannot be used.
    """
    name = part_name(source)
    if format == "text" or (format is None and is_texts(source)):
        if opener is not None or source == STDIN:
            raise InputError(f"{source}: texts are read where they lie, each as a file: leave out --server-side")
        return TextsPart(index, name, texts_of(source, source), lambda: texts_of(source, source))

    def open_it() -> Source:
        if source == STDIN:
            return Source("standard input", _own_stdin() if stdin is None else stdin)
        if is_object(source):
            return ObjectSource(parse_object(source, "corpus"), source)
        if is_hub(source):
            return HubSource(parse_hub(source), source)
        return FileSource(name, source, opener)

    opened = open_it()
    return (kind or _PARTS[format or recognized(opened)])(index, name, opened, open_it)


_PARTS: dict[CorpusFormat, type[SourcePart[Any]]] = {
    "jsonl": FilePart,
    "json": ArrayPart,
    "csv": CsvPart,
    "parquet": ParquetPart,
    "arrow": ArrowPart,
}


def recognized(source: Source) -> CorpusFormat:
    """What a source is by its first bytes and, where these are any text, by its name. Raises `InputError`."""
    formats: dict[CorpusFormat, bytes] = {"parquet": parquet_part.MAGIC, "arrow": arrow_part.MAGIC}
    for format, magic in formats.items():
        if source.starts_with(magic):
            return format
    head, ending = source.plain.head, csv_part.suffix(source.label)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((arrow_part.MAGIC, arrow_part.STREAM_MAGIC)):
        return "arrow"
    if text[:1] == b"[":
        return "json"
    if ending in csv_part.SUFFIXES and text[:1] != b"{":
        return "csv"
    if not ending.startswith(".json") and text and csv_part.looks_like_csv(head, source.label):
        return "csv"
    return "jsonl"


def check_sources(
    sources: Sequence[str],
    stdin: ByteStream | None = None,
    notice: Callable[[str], None] | None = None,
    spec: JobSpec | None = None,
    format: CorpusFormat | None = None,
) -> list[SourcePart[Any]]:
    """The parts of a corpus, each opened and looked into. The first `MOST_OPEN` stay open for their first reading.

    `notice` is told, from another thread, of a source whose first record takes long, such as a pipe that no program
    writes into. `spec`: by its fields the first rows are looked at; None: they are not. `format`: as in `JobSpec`.

    Raises:
        InputError: one cannot be read; there are no records at all; or no part begins with one that the job can use.
        UsageError: no source, or one file is given twice.
    """
    if not sources:
        raise UsageError("no corpus given: name a file or a folder, or - for standard input")
    parts: list[SourcePart[Any]] = []
    seen: dict[object, str] = {}
    empty: list[str] = []
    unusable: list[NothingUsable] = []
    for index, source in enumerate(sources):
        if source in sources[:index]:
            raise UsageError(f"{source}: given twice")
        with _telling(source, notice):
            part = open_part(index, source, stdin, format=format)
        if part.identity in seen:
            raise UsageError(f"{source}: is the same file as {seen[part.identity]}")
        if part.identity is not None:
            seen[part.identity] = source
        parts.append(part)
        if part.empty:
            empty.append(f"{part.label}: has no records")
            part.advice = f"{empty[-1]}: it counts as a part of 0 rows"
        elif spec is not None:
            try:
                with _telling(source, notice):
                    part.advice = part.hint(spec)
            except NothingUsable as error:
                unusable.append(error)
                part.advice = str(error)
        if index >= MOST_OPEN:
            part.release()
    if len(empty) == len(parts):
        raise InputError(empty[0])
    if len(empty) + len(unusable) == len(parts):
        raise InputError(f"{unusable[0]}: nothing was started")
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


def total_bytes(parts: Iterable[Part]) -> int | None:
    """Bytes to read, for progress; None if a stream is among the parts."""
    sizes = [part.size for part in parts]
    return None if None in sizes else sum(size for size in sizes if size is not None)


class _Head:
    """Lines, or what takes their place, read up to the first record."""

    def __init__(self, source: Source, stream: LineStream | ArrayStream) -> None:
        """Raises `InputError`, with the source closed."""
        self.source = source
        self.plain = stream.plain
        self.held: list[tuple[int, list[bytes]]] = []
        """Lines that were looked at, with the place of the first; none: there are no records."""
        self._rest = stream.batches()
        try:
            for row, lines in self._rest:
                if not all(map(_is_blank, lines)):
                    self.held.append((row, lines))
                    break
        except InputError:
            source.close()
            raise

    def looked_at(self) -> Iterator[tuple[int, list[bytes]]]:
        """The lines from the first record on, as many as are asked for but for a bound; they stay for `batches`.

        Raises:
            InputError: more of them cannot be read.
        """
        yield from tuple(self.held)
        size = 0
        while size < MOST_HELD_BYTES and (more := next(self._rest, None)) is not None:
            self.held.append(more)
            size += sum(map(len, more[1]))
            yield more

    def batches(self) -> Iterator[tuple[int, list[bytes]]]:
        while self.held:
            yield self.held.pop(0)
        yield from self._rest

    def close(self) -> None:
        self.source.close()


def _judge(reader: RecordReader, row: int, lines: Iterable[bytes]) -> Iterator[Outcome]:
    """How the lines from `row` on end; blank ones only count as rows."""
    return (reader.line(at, line) for at, line in enumerate(lines, row) if not _is_blank(line))


def _own_stdin() -> ByteStream:
    if sys.stdin is None:
        raise InputError("standard input: is closed")
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)  # unbuffered, so that rows go out as they come in


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()
