"""Results of batches, put down by row: whatever batch a text was in, its results come out at its place."""

from __future__ import annotations

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
    return _Pieces(rows) if kind in ("sparse", "multivector") else _Whole(rows, info.dim)


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

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._pieces: list[tuple[Rows, Ragged]] = []

    def put(self, rows: Rows, values: Values) -> None:
        assert isinstance(values, Ragged)
        self._pieces.append((rows, values))

    def values(self) -> Ragged:
        if not self._pieces:
            return Ragged(np.zeros(self._rows, np.int64), np.zeros(0, np.float32), np.zeros(0, np.uint32))
        pieces = [values for _, values in self._pieces]
        count = sum(map(len, pieces))
        # One text more, of nothing, stands for those that never came.
        found = np.full(self._rows, count, np.int64)
        found[np.concatenate([rows for rows, _ in self._pieces])] = np.arange(count)
        indices = [piece.indices for piece in pieces if piece.indices is not None]
        joined = Ragged(
            np.concatenate([*(piece.counts for piece in pieces), np.zeros(1, np.int64)]),
            np.concatenate([piece.values for piece in pieces]),
            np.concatenate(indices) if indices else None,
        )
        return joined.take(found)
