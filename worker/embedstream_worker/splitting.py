"""Where a text may well be cut, and chunks of at most so many tokens that begin and end there. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedstream.jobs import ChunkBy

Numbers = npt.NDArray[np.int64]

_WORD, _CLAUSE, _SENTENCE, _LINE, _PARAGRAPH, _HEADING = 1, 2, 3, 4, 5, 6
"""How good a place to cut is. Headings of Markdown are better the higher they are."""

_CLOSING = r"\"'\u201d\u2019\u00bb)\]\u300d\u300f"
_PLACES: dict[int, re.Pattern[str]] = {
    _CLAUSE: re.compile(r"[;:,\u2013\u2014]\s+|[\uff0c\uff1b\uff1a\u3001]\s*"),
    _SENTENCE: re.compile(rf"[.!?\u2026]+[{_CLOSING}]*\s+|[\u3002\uff01\uff1f]+[{_CLOSING}]*\s*"),
    _LINE: re.compile(r"\n\s*"),
    _PARAGRAPH: re.compile(r"\n[^\S\n]*\n\s*"),
}
"""A piece may begin behind each."""
_HEADINGS = re.compile(r"^(#{1,6})[ \t]", re.M)
_FENCES = re.compile(r"^(```+|~~~+).*?(?:^\1[ \t]*$|\Z)", re.M | re.S)
_SPACES = re.compile(r"\s*")

_LEAST_FILLED = 4
"""A chunk ends at the best place in it beyond this part of its tokens, so that a heading does not stand alone."""


class Places(NamedTuple):
    """Where pieces of a text may begin, in order."""

    at: Numbers  # [n] characters
    level: Numbers  # [n]
    token: Numbers  # [n]: how many tokens begin before


def places(text: str, by: ChunkBy, tokens: Numbers) -> Places:
    """`tokens`: where each token begins, in characters, ascending."""
    level: dict[int, int] = {}
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    spaces = (codes == 32) | ((codes >= 9) & (codes <= 13)) | (codes == 0x3000)
    words = np.flatnonzero(spaces[:-1] & ~spaces[1:]) + 1 if len(codes) else np.empty(0, np.int64)
    for rank in [_SENTENCE, _PARAGRAPH] if by == "sentence" else [*_PLACES]:
        for found in _PLACES[rank].finditer(text):
            level[found.end()] = rank
    if by == "markdown":
        level |= {found.start(): _HEADING + 6 - len(found[1]) for found in _HEADINGS.finditer(text)}
        for fence in _FENCES.finditer(text):
            for at in [at for at in level if fence.start() < at < fence.end()]:
                level[at] = min(level[at], _WORD)
            level[fence.start()] = _PARAGRAPH
    every = np.union1d(words, np.fromiter(level, np.int64, len(level)))
    every = every[(every > 0) & (every < len(text))]
    levels = np.array([level.get(place, _WORD) for place in every.tolist()], np.int64)
    return Places(every, levels, np.searchsorted(tokens, every))


def split(text: str, tokens: Numbers, most: int, overlap: int, by: ChunkBy) -> list[tuple[int, int]] | None:
    """Chunks [start, end) in characters, without white space at their ends, that together have all the rest.

    `tokens`: where each token of the text begins. A chunk has at most `most` of them, and at most `overlap` of those
    of the one before. None: a single character has more.
    """
    found = places(text, by, tokens)
    chunks: list[tuple[int, int]] = []
    end = len(text.rstrip())
    start, reached = _skip(text, 0), 0
    while start < end:
        first = int(np.searchsorted(tokens, start))
        if first + most >= len(tokens) or int(tokens[first + most]) >= end:
            chunks.append((start, end))
            break
        limit = int(tokens[first + most])
        stop = _best(found, max(start, reached), first + most // _LEAST_FILLED, limit) or limit
        if stop <= max(start, reached):
            return None
        chunks.append((start, start + len(text[start:stop].rstrip())))
        reached = stop
        start = _skip(text, _back(found, tokens, start, stop, overlap))
    return chunks


def _best(found: Places, after: int, filled: int, limit: int) -> int | None:
    """The last of the best places within (after, limit], if there is one; one that leaves enough behind, if it can."""
    low, high = np.searchsorted(found.at, [after, limit], "right")
    if low == high:
        return None
    full = low + int(np.searchsorted(found.token[low:high], filled))
    if full < high:
        low = full
    levels = found.level[low:high]
    return int(found.at[low + np.flatnonzero(levels == levels.max())[-1]])


def _back(found: Places, tokens: Numbers, start: int, stop: int, overlap: int) -> int:
    """Where the chunk behind `stop` begins: at most so many tokens before, at a sentence rather than at a word."""
    if not overlap:
        return stop
    earliest = int(np.searchsorted(tokens, stop)) - overlap
    low, high = np.searchsorted(found.at, [start, stop], "right")
    low += int(np.searchsorted(found.token[low:high], earliest))
    for least in (_SENTENCE, _WORD):
        good = np.flatnonzero(found.level[low:high] >= least)
        if len(good):
            return int(found.at[low + good[0]])
    return stop


def _skip(text: str, at: int) -> int:
    """Behind the white space at a place."""
    skipped = _SPACES.match(text, at)
    return skipped.end() if skipped else at
