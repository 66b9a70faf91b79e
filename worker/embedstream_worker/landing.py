"""Results of batches, put down by row: whatever batch a text was in, its results come out at its place."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Matrix, Ragged, Values
from embedstream.outputs import Kind
from embedstream_worker.engines.base import OutputInfo

Rows = npt.NDArray[np.int64]


class Landing(Protocol):
    """Results of one kind for n texts."""

    def put(self, rows: Rows, values: Values) -> None:
        """Those of some rows. Twice is harmless: the last ones count."""

    def values(self) -> Values:
        """Those of all rows, in order; of rows that never came: zeros, or nothing."""


def landing(kind: Kind, info: OutputInfo, rows: int) -> Landing:
    """Where results of a kind come down."""
    match kind:
        case "sparse":
            return _Pieces(rows, None)
        case "multivector":
            return _Pieces(rows, info.dim)
        case _:
            return _Whole(rows, info.dim)


class _Whole:
    def __init__(self, rows: int, width: int) -> None:
        self._values: Matrix = np.zeros((rows, width), np.float32)

    def put(self, rows: Rows, values: Values) -> None:
        assert not isinstance(values, Ragged)
        self._values[rows] = values

    def values(self) -> Matrix:
        return self._values


class _Pieces:
    """What differs in length by text is kept as it comes, and put in order once."""

    def __init__(self, rows: int, dim: int | None) -> None:
        """`dim`: of each token's vector; None: a weight with its index."""
        self._dim = dim
        self._counts = np.zeros(rows, np.int64)
        self._newest = np.zeros(rows, np.int64)
        """Which piece has a row's results."""
        self._pieces: deque[tuple[Rows, Ragged]] = deque()
        self._joined: Ragged | None = None

    def put(self, rows: Rows, values: Values) -> None:
        assert isinstance(values, Ragged)
        self._counts[rows] = values.counts
        self._newest[rows] = len(self._pieces)
        self._pieces.append((rows, values))

    def values(self) -> Ragged:
        if self._joined is None:
            self._joined = self._join()
        return self._joined

    def _join(self) -> Ragged:
        """Pieces are let go as they are copied."""
        total = int(self._counts.sum())
        values = np.empty(total if self._dim is None else (total, self._dim), np.float32)
        indices = np.empty(total, np.uint32) if self._dim is None else None
        starts = np.cumsum(self._counts) - self._counts
        for number in range(len(self._pieces)):
            rows, piece = self._pieces.popleft()
            kept = np.flatnonzero(self._newest[rows] == number)
            if len(kept) < len(rows):
                rows, piece = rows[kept], piece.take(kept)
            places = np.arange(len(piece.values)) + np.repeat(starts[rows] - piece.offsets[:-1], piece.counts)
            values[places] = piece.values
            if indices is not None and piece.indices is not None:
                indices[places] = piece.indices
        return Ragged(self._counts, values, indices)
