"""Equal texts are computed once: those of a window, and those whose results are remembered from an earlier one."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.values import Ragged, Values
from embedstream.outputs import Kind
from embedstream.queue.workers import InHand
from embedstream.settings import MIB
from embedstream_worker.engines.base import OutputInfo, Results
from embedstream_worker.held import EmbeddedGroup, RowErrors, TokenizedGroup
from embedstream_worker.landing import landing
from embedstream_worker.work import Work

Rows = npt.NDArray[np.int64]

RECENT_BYTES = 64 * MIB
"""What is remembered of the last windows: some 40,000 vectors of 384 dimensions."""

ENTRY_BYTES = 256
"""What finding a text takes beside its results: its hash, its place and their share of a dict."""

Maker = tuple[str, frozenset[Kind]]
"""What, besides a text, decides its results: the job's space, and the kinds that it wants."""


class Distinct(NamedTuple):
    """The m texts that n rows have."""

    first: Rows  # [m]: the first row that has the text, ascending
    text: Rows  # [n]: which of them a row has


def distinct(hashes: pa.FixedSizeBinaryArray) -> Distinct:
    """By the column `input_hash` [n], which is over all that enters the model of a row."""
    encoded = hashes.dictionary_encode()
    text = encoded.indices.to_numpy().astype(np.int64)
    first = np.empty(len(encoded.dictionary), np.int64)
    first[text[::-1]] = np.arange(len(text))[::-1]  # of several rows the last one assigned counts
    return Distinct(first, text)


def of_all_rows(errors: RowErrors, text: Rows) -> RowErrors:
    """Errors of texts as those of all rows that have them."""
    if not errors:
        return {}
    rows = np.flatnonzero(np.isin(text, list(errors)))
    return {row: errors[int(text[row])] for row in rows.tolist()}


def _taken(values: Values, rows: Rows) -> Values:
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


def _row_bytes(values: Values) -> npt.NDArray[np.int64]:
    """What each row's numbers take, [n]."""
    if not isinstance(values, Ragged):
        return np.full(len(values), values.itemsize * values.shape[1], np.int64)
    each = values.values.itemsize * (values.values.shape[1] if values.values.ndim > 1 else 1)
    return values.counts * (each + (0 if values.indices is None else values.indices.itemsize))


@dataclass(frozen=True, eq=False)
class _Piece:
    """What is remembered of one window's texts."""

    maker: Maker
    hashes: list[bytes]
    results: Mapping[Kind, Values]
    bytes: int


class Recent:
    """Results of the last texts that were computed, by what entered the model. Not shared between threads."""

    def __init__(self, most_bytes: int = RECENT_BYTES) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._pieces: deque[_Piece] = deque()
        self._places: dict[Maker, dict[bytes, tuple[_Piece, int]]] = {}

    def find(self, maker: Maker, hashes: Sequence[bytes]) -> Iterator[tuple[Rows, Mapping[Kind, Values]]]:
        """Of the texts that are remembered: their places in `hashes`, and their results."""
        known = self._places.get(maker)
        if not known:
            return
        found = defaultdict[_Piece, list[tuple[int, int]]](list)
        for at, hash in enumerate(hashes):
            if (place := known.get(hash)) is not None:
                found[place[0]].append((at, place[1]))
        for piece, pairs in found.items():
            at, rows = np.array(pairs, np.int64).T
            yield at, {kind: _taken(values, rows) for kind, values in piece.results.items()}

    def keep(self, maker: Maker, hashes: Sequence[bytes], results: Mapping[Kind, Values]) -> None:
        """Remember these texts, or as many of the last ones as there is room for, in place of the oldest."""
        sizes = ENTRY_BYTES + sum((_row_bytes(values) for values in results.values()), np.zeros(len(hashes), np.int64))
        count = int((np.cumsum(sizes[::-1]) <= self._most).sum())
        if not count:
            return
        rows = np.arange(len(hashes) - count, len(hashes))
        copied = {kind: _taken(values, rows) for kind, values in results.items()}
        piece = _Piece(maker, list(hashes[-count:]), copied, int(sizes[-count:].sum()))
        while self._bytes + piece.bytes > self._most:
            self._forget(self._pieces.popleft())
        self._pieces.append(piece)
        self._bytes += piece.bytes
        known = self._places.setdefault(maker, {})
        known |= {hash: (piece, row) for row, hash in enumerate(piece.hashes)}

    def _forget(self, piece: _Piece) -> None:
        self._bytes -= piece.bytes
        known = self._places[piece.maker]
        for hash in piece.hashes:
            if known[hash][0] is piece:  # or a later window had it, too
                del known[hash]
        if not known:
            del self._places[piece.maker]


class Begun:
    """A group in the model: `work` has one row for each text that is to be computed."""

    def __init__(self, group: TokenizedGroup, outputs: Mapping[Kind, OutputInfo], padded: bool, recent: Recent) -> None:
        """`outputs`, `padded`: as in `Work`."""
        self.group = group
        self._outputs = outputs
        self._recent = recent
        self._maker: Maker = group.job.space, frozenset(outputs)
        rows = len(group.input_hashes)
        if group.note is None:
            self._texts = distinct(group.input_hashes)
            firsts: Any = pa.array(self._texts.first)
            self._hashes = cast("list[bytes]", group.input_hashes.take(firsts).to_pylist())
            self._found = [*recent.find(self._maker, self._hashes)]
        else:  # each row has to show what it does to the worker
            self._texts, self._hashes, self._found = Distinct(np.arange(rows), np.arange(rows)), [], []
        self._taken_over = ~group.new[self._texts.first]
        new = ~self._taken_over
        for at, _ in self._found:
            new[at] = False
        self._new = np.flatnonzero(new)
        self._first = self._texts.first[self._new]
        self._whole = len(self._first) == rows
        """Whether the model gets every row."""
        tokens = group.tokens if self._whole else group.tokens.take(self._first)
        failed = {at: group.errors[row] for at, row in enumerate(self._first.tolist()) if row in group.errors}
        job = group.job
        self.work = Work(tokens, job.prompt_length, job.spec.role, outputs, padded, failed, group.note)

    @property
    def in_hand(self) -> InHand:
        """What is computed so far, rows of equal texts included."""
        done, lengths = self._done(), self.group.tokens.lengths
        return InHand(*map(int, (done.sum(), lengths[done].sum(), self._computed()[done].sum())))

    def embedded(self) -> EmbeddedGroup:
        """The group with its results, each text's in all rows that have it; for later windows they are remembered."""
        work, text = self.work, self._texts.text
        if self._whole:
            results, errors = work.results(), work.errors
        else:
            results = self._results()
            errors = of_all_rows({int(self._new[at]): error for at, error in work.errors.items()}, text)
            errors |= self.group.errors  # of a text with results from another job, which took what this one refuses
        duplicates = np.ones(len(text), np.bool_)
        duplicates[self._first] = False
        duplicates &= self.group.new
        done = self._done()
        if self._hashes:
            good = done[self._texts.first] & ~self._taken_over
            good[[int(text[row]) for row in errors]] = False
            self._remember(np.flatnonzero(good), results)
        return EmbeddedGroup(self.group, results, self._computed(), done, errors, duplicates)

    def _results(self) -> Results:
        places = {kind: landing(kind, info, len(self._texts.text)) for kind, info in self._outputs.items()}
        for texts, results in [(self._new, cast("Mapping[Kind, Values]", self.work.results())), *self._found]:
            at = np.full(len(self._texts.first), -1)
            at[texts] = np.arange(len(texts))
            at = at[self._texts.text]
            rows = np.flatnonzero(at >= 0)
            for kind, place in places.items():
                place.put(rows, _taken(results[kind], at[rows]))
        return cast("Results", {kind: place.values() for kind, place in places.items()})

    def _remember(self, texts: Rows, results: Results) -> None:
        rows, values = self._texts.first[texts], cast("Mapping[Kind, Values]", results)
        hashes = [self._hashes[at] for at in texts.tolist()]
        self._recent.keep(self._maker, hashes, {kind: _taken(values[kind], rows) for kind in self._outputs})

    def _done(self) -> npt.NDArray[np.bool_]:
        done = np.ones(len(self._texts.first), np.bool_)
        done[self._new] = self.work.done
        mine: npt.NDArray[np.bool_] = done[self._texts.text]
        return mine

    def _computed(self) -> npt.NDArray[np.int64]:
        """As `EmbeddedGroup.computed`: a text that is not computed again has no padding."""
        computed = self.group.tokens.lengths.copy()
        computed[self._first] = self.work.computed
        return computed
