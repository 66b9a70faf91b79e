"""Records whose texts are cut into chunks, by a process of the worker's that has the model's tokenizer."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import threading
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from embedstream.chunks import Chunked, Cut, Document, chunk_input
from embedstream.cli.starting import environment, python_command
from embedstream.corpus.records import Record
from embedstream.errors import EmbedstreamError, InputError, ModelError, UsageError
from embedstream.jobs import JobSpec, decode_spec
from embedstream.planning import TokenCounter, receive, send
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import Code, refusal
from embedstream.settings import BLOCK_LIMITS

T = TypeVar("T")

Chunk = tuple[str, int, tuple[str | None, ...], int, tuple[int | None, int | None]]
"""What `Packer.add` takes of a chunk: its text, bytes of that, kept fields, number, and where it lies."""


class Chunker:
    """Cuts the texts of one job. Shared between threads; the process ends with this one."""

    def __init__(self, spec: JobSpec) -> None:
        """Raises `ModelError`: the model's tokenizer is not to be had here."""
        assert spec.chunking is not None
        self._chunking, self._title_sep = spec.chunking, spec.title_sep
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            python_command("embedstream_worker.planning"),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.about = self._asked(spec, TokenCounter, ModelError)
        if self.about.trouble:
            raise ModelError(f"--chunk-tokens: texts are cut by the model's tokenizer: {self.about.trouble}")

    def chunks(self, records: Sequence[Record]) -> list[list[Chunk] | Refusal]:
        """The chunks of each record, or its refusal. Raises `InputError` if the process has ended."""
        if not records:
            return []
        asked = Cut([Document(record.title, record.text) for record in records])
        found = self._asked(asked, Chunked, InputError).chunks
        return [self._chunks(record, spans) for record, spans in zip(records, found, strict=True)]

    def _chunks(self, record: Record, spans: list[tuple[int, int]] | str) -> list[Chunk] | Refusal:
        if isinstance(spans, str):
            message = f"the text cannot be cut: {spans}"
            return refusal(record.row, record.id, Code.NOT_CUT, message, record.source)
        made: list[Chunk] = []
        for number, (start, end) in enumerate(spans):
            text = chunk_input(self._chunking, self._title_sep, record.title, record.text[start:end])
            size = len(text.encode())
            if size > BLOCK_LIMITS.longest_text_bytes:
                message = f"chunk {number} has {size:,} bytes, at most {BLOCK_LIMITS.longest_text_bytes:,} are allowed"
                return refusal(record.row, record.id, Code.TEXT_TOO_LONG, message, record.source)
            made.append((text, size, record.kept, number, (start, end)))
        return made

    def _asked(self, question: object, kind: type[T], error: type[EmbedstreamError]) -> T:
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None
        assert answer is not None
        with self._lock, contextlib.suppress(OSError):
            send(ask, question)
            if (found := receive(answer, kind)) is not None:
                return found
        _chunker.cache_clear()  # another try has a process of its own
        raise error("the process that cuts texts has ended: run the same command again")


@functools.lru_cache(maxsize=4)
def _chunker(spec: bytes) -> Chunker:
    return Chunker(decode_spec(spec))


def chunker_of(spec: JobSpec) -> Chunker:
    """The one of a job, and of all that are cut alike. Raises as `Chunker`."""
    assert spec.chunking is not None
    chunking = msgspec.structs.replace(spec.chunking, tokenizer="")
    alike = msgspec.structs.replace(
        spec, queue="q", output="/", parts=(), keep=(), keep_types={}, outputs=(), retry=None, chunking=chunking
    )
    return _chunker(alike.encode())


def with_tokenizer(spec: JobSpec) -> JobSpec:
    """The spec with what its chunks depend on: the tokenizer's sum, and the model's length where none is given.

    Raises:
        ModelError: the model's tokenizer is not to be had here.
        UsageError: chunks of this size cannot be, or the model does not take them.
    """
    chunking = spec.chunking
    if chunking is None:
        return spec
    about = chunker_of(spec).about
    most = spec.max_length or about.max_length
    tokens = chunking.tokens or most
    if tokens > most:
        raise UsageError(f"--chunk-tokens {tokens}: the model takes at most {most:,} tokens: give that or less")
    if tokens <= about.overhead + chunking.overlap:
        overlap = f" and the overlap {chunking.overlap}" if chunking.overlap else ""
        raise UsageError(
            f"--chunk-tokens {tokens}: prompt, format and special tokens take {about.overhead} of them{overlap}: give "
            f"at least {about.overhead + chunking.overlap + 1}"
        )
    return msgspec.structs.replace(
        spec, chunking=msgspec.structs.replace(chunking, tokens=tokens, tokenizer=about.tokenizer)
    )
