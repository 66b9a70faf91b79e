"""Texts to chunks, by the tokenizer of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedstream.chunks import Document, Spans, Token, chunk_input
from embedstream.jobs import Chunking
from embedstream_worker.engines.base import Tokens
from embedstream_worker.splitting import split

SEGMENT_CHARACTERS = 256 * 1024
"""Longer texts are tokenized, and cut, in parts of so many characters: a token takes a hundred bytes meanwhile."""

_TOO_SMALL = "a single character of it has more tokens than a chunk may have: make chunks longer (--chunk-tokens)"


@runtime_checkable
class SpanTokenizer(Protocol):
    """A `TextTokenizer` that says where tokens are."""

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens: ...

    def begins(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Where the tokens of each text begin in it, in characters, special tokens left out."""

    def spelled(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[Token, ...]]:
        """All tokens of each text, however many."""

    def as_json(self) -> str: ...


def tokenizer_sum(tokenizer: SpanTokenizer) -> str:
    """What decides where texts are cut, as 32 hex digits."""
    return hashlib.blake2b(tokenizer.as_json().encode(), digest_size=16).hexdigest()


class Cutter:
    """Cuts the documents of one job."""

    def __init__(self, tokenizer: SpanTokenizer, prompt: str, chunking: Chunking, title_sep: str) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._chunking = chunking
        self._title_sep = title_sep

    def cut(self, documents: Sequence[Document]) -> list[Spans | str]:
        """The chunks of each document; why it has none."""
        segments = [(at, *segment) for at, document in enumerate(documents) for segment in _segments(document.text)]
        rooms = self._rooms(documents)
        found: list[Any] = [[] for _ in documents]
        for at, offset, text, tokens in self._tokenized(segments):
            room = rooms[at]
            if isinstance(room, str):
                found[at] = room
            elif isinstance(found[at], list):
                spans = self._fitting(documents[at], text, tokens, room)
                found[at] = _TOO_SMALL if spans is None else found[at] + [(offset + a, offset + b) for a, b in spans]
        return found

    def _tokenized(
        self, segments: Iterable[tuple[int, int, str]]
    ) -> Iterator[tuple[int, int, str, npt.NDArray[np.int64]]]:
        """Each with where its tokens begin; few of them are in memory at once."""
        size, held = 0, list[tuple[int, int, str]]()
        for segment in (*segments, None):
            if segment is None or size + len(segment[2]) > SEGMENT_CHARACTERS:
                begins = self._tokenizer.begins([text for *_, text in held])
                yield from ((*each, tokens) for each, tokens in zip(held, begins, strict=True))
                size, held = 0, []
            if segment is not None:
                size += len(segment[2])
                held.append(segment)

    def _rooms(self, documents: Sequence[Document]) -> list[int | str]:
        """What prompt, special tokens, title and format leave for each document's text; why that is too little."""
        most = self._chunking.tokens
        frames = self._lengths([self._input(document, "") for document in documents])
        return [
            most - used
            if most - used > self._chunking.overlap
            else f"its title, with prompt and special tokens, has {used} tokens, and a chunk at most {most}: shorten "
            f"it, leave it out (--title-field ''), or make chunks longer (--chunk-tokens)"
            for used in frames
        ]

    def _fitting(self, document: Document, text: str, tokens: npt.NDArray[np.int64], room: int) -> Spans | None:
        """Chunks of a part of a document whose inputs have no more tokens than they may; None: there are none."""
        overlap = min(self._chunking.overlap, room - 1)
        spans = split(text, tokens, room, overlap, self._chunking.by) if room > 0 else None
        if not spans:
            return spans
        inputs = [self._input(document, text[start:end]) for start, end in spans]
        longer = self._tokenizer.encode(inputs, self._chunking.tokens).truncated
        found: Spans = []
        for (start, end), long in zip(spans, longer.tolist(), strict=True):
            if not long:
                found.append((start, end))
                continue
            # A tokenizer may make more of a piece than of the whole: of such a piece its own tokens count.
            piece = text[start:end]
            [own] = self._tokenizer.begins([piece])
            parts = self._fitting(document, piece, own, min(room, len(own) - 1))
            if parts is None:
                return None
            found += [(start + first, start + last) for first, last in parts]
        return found

    def _lengths(self, inputs: list[str]) -> list[int]:
        """Tokens of each, as far as a chunk may have them."""
        if not inputs:
            return []
        distinct = list(dict.fromkeys(inputs))
        lengths = self._tokenizer.encode(distinct, self._chunking.tokens).lengths.tolist()
        known = dict(zip(distinct, lengths, strict=True))
        return [known[text] for text in inputs]

    def _input(self, document: Document, chunk: str) -> str:
        return self._prompt + chunk_input(self._chunking, self._title_sep, document.title, chunk)


def _segments(text: str) -> list[tuple[int, str]]:
    """A long text in parts that end at the end of a paragraph, line or word, if they can, and where each begins."""
    found, start = [], 0
    while len(text) - start > SEGMENT_CHARACTERS:
        middle, limit = start + SEGMENT_CHARACTERS // 2, start + SEGMENT_CHARACTERS
        ends = (text.rfind(sign, middle, limit) + len(sign) for sign in ("\n\n", "\n", ". ", " "))
        end = next((end for end in ends if end > middle), limit)
        found.append((start, text[start:end]))
        start = end
    return [*found, (start, text[start:])]
