"""From a window's token counts to batches of equal work. Pure: it sees lengths and answers with row numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedstream.outputs import Kind
from embedstream_worker.engines.base import Role, TokenBatch, Tokens

Rows = npt.NDArray[np.int64]

MOST_ROWS = 4096
"""Bound on rows of a batch: with very short texts more rows buy no speed, and each costs an output vector."""

_BALANCING_STEPS = 8  # each halves the range in which the evenest budget lies: under 1 % of it is left


def batch_cost(lengths: npt.NDArray[np.int64], padded: bool) -> int:
    """Tokens that the model computes for rows of these lengths: longest x n if it pads, else their sum."""
    if len(lengths) == 0:
        return 0
    return int(lengths.max()) * len(lengths) if padded else int(lengths.sum())


def cut_batches(
    lengths: npt.NDArray[np.int64], budget: int, padded: bool, most_rows: int = MOST_ROWS
) -> list[npt.NDArray[np.int64]]:
    """Cut rows into batches of `batch_cost` <= `budget`, longest rows first, each row in exactly one batch.

    A row that exceeds the budget by itself is a batch of its own. The work is spread evenly over as many batches as
    the budget asks for, so that no small remainder is left. `lengths`: tokens per row, [n]; the answer: row numbers.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    # An empty text still is a row of work, and costs of 0 would make batches without end.
    descending = np.maximum(lengths[order], 1)
    sums = np.cumsum(descending)
    cuts = _cut(descending, sums, budget, padded, most_rows)
    low, high = 0, budget
    for _ in range(_BALANCING_STEPS if len(cuts) > 1 else 0):
        middle = (low + high) // 2
        tighter = _cut(descending, sums, middle, padded, most_rows, at_most=len(cuts))
        if tighter:
            cuts, high = tighter, middle
        else:
            low = middle
    return np.split(order, cuts[:-1]) if cuts else []


def _cut(
    descending: npt.NDArray[np.int64],
    sums: npt.NDArray[np.int64],
    budget: int,
    padded: bool,
    most_rows: int,
    at_most: int | None = None,
) -> list[int]:
    """Ends of greedily filled batches; empty if they are more than `at_most`."""
    cuts: list[int] = []
    start, count = 0, len(descending)
    while start < count:
        if len(cuts) == at_most:
            return []
        if padded:
            rows = budget // int(descending[start])
        else:
            before = int(sums[start - 1]) if start else 0
            rows = int(np.searchsorted(sums, before + budget, side="right")) - start
        start = min(start + min(max(rows, 1), most_rows), count)
        cuts.append(start)
    return cuts


def join_tokens(pieces: Sequence[Tokens]) -> Tokens:
    """The tokens of several blocks as those of one window, in the same order."""
    if len(pieces) == 1:
        return pieces[0]
    lengths = [piece.lengths for piece in pieces]
    return Tokens(
        ids=np.concatenate([np.empty(0, np.int32), *(piece.ids for piece in pieces)]),
        offsets=np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths])),
        truncated=np.concatenate([np.empty(0, np.bool_), *(piece.truncated for piece in pieces)]),
        types=_join_types(pieces),
    )


def _join_types(pieces: Sequence[Tokens]) -> npt.NDArray[np.int8] | None:
    if all(piece.types is None for piece in pieces):
        return None
    return np.concatenate(
        [np.zeros(len(piece.ids), np.int8) if piece.types is None else piece.types for piece in pieces]
    )


def gather_batch(
    tokens: Tokens, rows: Rows, prompt_length: int, role: Role, kinds: frozenset[Kind] | None = None
) -> TokenBatch:
    """The batch of these rows, in this order. Its results belong to `rows`: `window[rows] = vectors` restores order.

    `kinds`: of results that are wanted; None: all that the model gives.
    """
    taken = tokens.take(rows)
    return TokenBatch(
        ids=taken.ids,
        offsets=taken.offsets,
        longest=int(taken.lengths.max(initial=0)),
        prompt_length=prompt_length,
        role=role,
        types=taken.types,
        kinds=kinds,
    )
