"""A folder of texts: each file is a row, its id its name below the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from embedstream.corpus.records import LONGEST_DOCUMENT_BYTES, Outcome, RecordReader
from embedstream.jobs import JobSpec
from embedstream.queue.refusals import Code, refusal
from embedstream.records import PartContent
from embedstream_producer.sources import Source, SourcePart
from embedstream_producer.trees import Tree

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".mdx", ".rst", ".adoc", ".org")
"""Of names, by which files of a folder are taken for texts."""

ROWS_AT_ONCE = 64
MOST_BYTES = LONGEST_DOCUMENT_BYTES + 1
"""Read of a file: so much shows that it is too long."""


class TextsSource(Source):
    """The files of a folder, in the order of their names."""

    def __init__(self, tree: Tree, files: Sequence[tuple[str, int]], name: str, label: str) -> None:
        """`files`: names in the tree, in order, and their bytes."""
        self.label = label
        self.tree = tree
        self.files = files
        self.size = sum(size for _, size in self.files)
        self.identity = name

    def close(self) -> None:
        """Nothing is open between two files."""


class TextsPart(SourcePart[TextsSource]):
    """Files of text."""

    @property
    def empty(self) -> bool:
        return not self._open().files

    def hint(self, spec: JobSpec) -> str | None:  # noqa: ARG002 - there are no fields to be named
        self.kept_types = {}
        return None

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        source, reader, digest, position = self._take(), RecordReader(spec, self.index), hashlib.sha256(), 0
        outcomes: list[Outcome] = []
        for row, (name, data) in enumerate(_read(source, digest)):
            position += len(data)
            outcomes.append(_judged(reader, row, name, data))
            if len(outcomes) == ROWS_AT_ONCE:
                yield outcomes
                outcomes = []
                if on_position is not None:
                    on_position(position)
        yield outcomes
        self.content = PartContent(position, digest.hexdigest())

    def read_content(self, on_position: Callable[[int], None]) -> PartContent | None:
        digest, position = hashlib.sha256(), 0
        for _, data in _read(self._open(), digest):
            position += len(data)
            on_position(position)
        return PartContent(position, digest.hexdigest())

    def _begin(self, source: Source) -> TextsSource:
        assert isinstance(source, TextsSource)
        return source


def _read(source: TextsSource, digest: hashlib._Hash) -> Iterator[tuple[str, bytes]]:
    """Names and contents, which go into the digest, each behind its length."""
    for name, _ in source.files:
        data = source.tree.read(name, MOST_BYTES)
        for piece in (name.encode(errors="surrogateescape"), data):
            digest.update(len(piece).to_bytes(8, "little") + piece)
        yield name, data


def _judged(reader: RecordReader, row: int, name: str, data: bytes) -> Outcome:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) < MOST_BYTES or error.end < len(data):
            message = f"byte {error.start + 1} of the file (0x{data[error.start]:02x}) is not UTF-8; convert the file"
            return refusal(row, name, Code.NOT_UTF8, message, data)
        text = data[: error.start].decode("utf-8-sig") + "?"  # it was cut in the middle of a character
    return reader.record(row, {"id": name, "text": text})
