"""The pairs of a run in TREC's format, with the texts of its queries and documents, as rows for a reranker.

A line has six columns between blanks: query id, `Q0`, document id, rank, score, tag. Queries lie in memory; of the
corpus, the texts of the run's documents lie in a temporary file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import msgspec

from embedstream.corpus.parts import Part
from embedstream.corpus.records import LONGEST_ID_BYTES, LONGEST_KEPT_BYTES, Outcome, Record
from embedstream.errors import InputError, OutputError
from embedstream.jobs import RUN_FIELDS, JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import Code, RowRefused, refusal
from embedstream.settings import MIB
from embedstream_producer.corpus import FilePart, check_sources, open_part
from embedstream_producer.sources import SourcePart

RUN_COLUMNS = 6

MOST_QUERY_BYTES = 256 * MIB
"""Of all queries, which are held in memory."""

_QUERY_BYTES = 256
"""What a query takes of it beside its id and its text or refusal."""

_Reason: TypeAlias = tuple[str, str]
"""Code and message of a refusal."""


class RunPart(FilePart):
    """The run itself: a file of pairs, each a row."""

    made_of: Sequence[RunTexts] = ()

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        queries, *corpus = self.made_of
        with _Documents() as documents:
            for _, lines in self.lines():
                documents.want(pair[1] for line in lines if (pair := _pair(line)) is not None)
            first = self.content
            texts = _queries(queries, of_queries(spec))
            for part in corpus:
                documents.fill(part.read(of_documents(spec)))
            if not documents.found:
                raise InputError(f"{self.label}: none of its documents is in {corpus[0].label}: give their corpus")
            for row, lines in self.lines(on_position):
                yield [_judge(at, line, texts, documents, spec) for at, line in enumerate(lines, row) if line.strip()]
            if self.content != first:
                raise InputError(f"{self.label}: was changed while it was read: run the same command again")

    def hint(self, spec: JobSpec) -> str | None:
        self.kept_types = dict.fromkeys(spec.keep, "string")
        first = next(line for _, lines in self._open().held for line in lines if line.strip())
        if _pair(first) is None:
            raise InputError(f"{self.label}: its first line is none of a run: {_words(first)}")
        return None


class RunTexts(Part):
    """A file of queries or documents: it has no rows of its own, and decides about those of the run."""

    def __init__(self, index: int, inner: SourcePart[Any]) -> None:
        super().__init__(index, inner.name, inner.label, inner.size, once=inner.once)
        self.advice = inner.advice
        self._inner = inner

    def read(self, spec: JobSpec) -> Iterator[Sequence[Outcome]]:
        """Its records. Raises `InputError`."""
        yield from self._inner.outcomes(spec)
        self.content = self._inner.content

    def read_content(self, on_position: Callable[[int], None]) -> Any:
        return self._inner.read_content(on_position)

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:  # noqa: ARG002
        if on_position is not None and self.size is not None:
            on_position(self.size)
        yield from ()


def check_corpus(
    sources: Sequence[str], spec: JobSpec, notice: Callable[[str], None] | None = None, look: bool = True
) -> Sequence[Part]:
    """The parts of a job, as its spec says what they are. `look`: also at the fields of the first rows.

    Raises as `check_sources` and `check_run`.
    """
    if spec.run:
        return check_run(sources, spec, notice)
    return check_sources(sources, notice=notice, spec=spec if look else None, format=spec.format)


def check_run(sources: Sequence[str], spec: JobSpec, notice: Callable[[str], None] | None = None) -> list[Part]:
    """The parts of a job over a run: the run, the queries, then the corpus, as `sources` names them.

    Raises:
        InputError: one cannot be read, has no records, or begins with none that can be used; or the run is a stream.
        UsageError: as `check_sources`.
    """
    name, queries, *corpus = sources
    run = open_part(0, name, kind=RunPart)
    assert isinstance(run, RunPart)
    if run.once:
        raise InputError(f"{run.label}: a run is read twice: save it in a file")
    if run.empty:
        raise InputError(f"{run.label}: has no records")
    run.hint(spec)
    asked = check_sources([queries], notice=notice, spec=of_queries(spec))
    found = check_sources(corpus, notice=notice, spec=of_documents(spec), format=spec.format)
    run.made_of = [RunTexts(index, part) for index, part in enumerate([*asked, *found], 1)]
    return [run, *run.made_of]


def of_queries(spec: JobSpec) -> JobSpec:
    """How queries are read: by the usual fields."""
    return msgspec.structs.replace(
        spec, keep=(), keep_types={}, query_field=None, empty="error", id_field=None, text_field=None, title_field=""
    )


def of_documents(spec: JobSpec) -> JobSpec:
    """How documents are read: as the job says, but for the fields that come of the run."""
    keep = tuple(name for name in spec.keep if name not in RUN_FIELDS)
    return msgspec.structs.replace(spec, keep=keep, query_field=None, empty="error")


def _pair(line: bytes) -> tuple[str, str] | None:
    """Ids of query and document; None for what is no line of a run."""
    words = line.split()
    if len(words) != RUN_COLUMNS or b"\0" in line:
        return None
    try:
        return words[0].decode(), words[2].decode()
    except UnicodeDecodeError:
        return None


def _words(line: bytes) -> str:
    count = len(line.split())
    if count == RUN_COLUMNS:
        return "its ids are not UTF-8, or hold NUL"
    return f"it has {count} columns, not {RUN_COLUMNS} (query id, Q0, document id, rank, score, tag)"


def _judge(row: int, line: bytes, queries: dict[str, str | _Reason], documents: _Documents, spec: JobSpec) -> Outcome:
    id = None
    try:
        pair = _pair(line)
        if pair is None:
            raise RowRefused(Code.BAD_RUN_LINE, _words(line))
        id = " ".join(pair)
        if len(id.encode()) > LONGEST_ID_BYTES:
            id = None
            raise RowRefused(Code.ID_TOO_LONG, f"its ids have more than {LONGEST_ID_BYTES:,} bytes")
        query = queries.get(pair[0])
        if query is None:
            raise RowRefused(Code.UNKNOWN_QUERY, f"no query has the id {pair[0]}")
        if not isinstance(query, str):
            raise RowRefused(Code(query[0]), f"query {pair[0]}: {query[1]}")
        found = documents.get(pair[1])
        if found is None:
            raise RowRefused(Code.UNKNOWN_DOCUMENT, f"no document has the id {pair[1]}")
        if not isinstance(found, Record):
            if found[0] == Code.EMPTY_TEXT and spec.empty == "skip":
                return None
            raise RowRefused(Code(found[0]), f"document {pair[1]}: {found[1]}")
    except RowRefused as refused:
        return refusal(row, id, refused.code, str(refused), line)
    own = dict(zip(RUN_FIELDS, (query, *pair), strict=True))
    given = iter(found.kept)
    kept = tuple(own[name] if name in own else next(given) for name in spec.keep)
    if sum(len(value.encode()) for value in kept if value) > LONGEST_KEPT_BYTES:
        message = f"query and kept fields have more than {LONGEST_KEPT_BYTES:,} bytes"
        return refusal(row, id, Code.KEPT_TOO_LONG, message, line)
    return Record(row, id, found.text, found.text_bytes, kept, line)


def _queries(part: RunTexts, spec: JobSpec) -> dict[str, str | _Reason]:
    """By id, the first of each: its text, or why it has none. Raises `InputError`."""
    found: dict[str, str | _Reason] = {}
    size = 0
    for outcomes in part.read(spec):
        for outcome in outcomes:
            if isinstance(outcome, Record):
                size += _QUERY_BYTES + len(outcome.id) + outcome.text_bytes
                found.setdefault(outcome.id, outcome.text)
            elif outcome is not None and outcome.id is not None:
                size += _QUERY_BYTES + len(outcome.id) + len(outcome.message)
                found.setdefault(outcome.id, (outcome.code, outcome.message))
        if size > MOST_QUERY_BYTES:
            raise InputError(f"{part.label}: its queries take more than {MOST_QUERY_BYTES:,} bytes: are these queries?")
    return found


class _Documents:
    """The documents that a run names, in a temporary file that vanishes with the process."""

    def __init__(self) -> None:
        # An empty name is a database in an unnamed file, of which a few megabytes are held in memory.
        self._database = sqlite3.connect("", isolation_level=None)
        self._run("PRAGMA journal_mode = OFF")
        self._run("CREATE TABLE documents (id TEXT PRIMARY KEY, text TEXT, kept TEXT, code TEXT) WITHOUT ROWID")
        self._run("BEGIN")
        self.found = 0

    def __enter__(self) -> _Documents:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def want(self, ids: Iterable[str]) -> None:
        """Raises `OutputError`, as all of its functions, if the disk is full."""
        self._run_all("INSERT OR IGNORE INTO documents (id) VALUES (?)", ((id,) for id in ids))

    def fill(self, batches: Iterable[Sequence[Outcome]]) -> None:
        """Put down what is wanted of the corpus; the first document of an id counts."""
        for outcomes in batches:
            self.found += self._run_all(
                "UPDATE documents SET text = ?, kept = ?, code = ? WHERE id = ? AND text IS NULL",
                (values for outcome in outcomes if (values := _values(outcome)) is not None),
            )

    def get(self, id: str) -> Record | _Reason | None:
        """A document, or why it has no text; None if the corpus has none of this id."""
        found = self._run("SELECT text, kept, code FROM documents WHERE id = ?", (id,))
        text, kept, code = next(found, (None, "[]", None))
        if text is None:
            return None
        if code is not None:
            return code, text
        return Record(0, id, text, len(text.encode()), tuple(msgspec.json.decode(kept)), None)

    def _run(self, sql: str, values: tuple[object, ...] = ()) -> Any:
        try:
            return self._database.execute(sql, values)
        except sqlite3.Error as error:
            raise _failed(error) from error

    def _run_all(self, sql: str, rows: Iterable[tuple[object, ...]]) -> int:
        """How many rows it changed."""
        try:
            return self._database.executemany(sql, rows).rowcount
        except sqlite3.Error as error:
            raise _failed(error) from error


def _values(outcome: Outcome) -> tuple[object, ...] | None:
    if isinstance(outcome, Refusal):
        return None if outcome.id is None else (outcome.message, None, outcome.code, outcome.id)
    if outcome is None:
        return None
    return outcome.text, msgspec.json.encode(outcome.kept).decode(), None, outcome.id


def _failed(error: sqlite3.Error) -> OutputError:
    return OutputError(f"texts of the run cannot be put on disk ({error}): make room, or name another folder (TMPDIR)")
