"""Texts on their way through the model: what is left to run, what came of what ran. Touches no engine and no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedstream.queue.workers import InHand
from embedstream.verify.findings import Kind
from embedstream.verify.rows import bad_vectors
from embedstream_worker.batching import batch_cost, cut_batches, gather_batch
from embedstream_worker.engines.base import OutputInfo, Role, TokenBatch, Tokens
from embedstream_worker.held import RowErrors

Rows = npt.NDArray[np.int64]

_ZERO = ("zero_vector", "the model gave a vector of zeros: it knows no part of the text")
_NORM = ("not_normalized", "the model gave a vector that cannot be brought to length 1")


class Taken(NamedTuple):
    """A batch on its way into the model."""

    rows: Rows
    batch: TokenBatch
    exact: bool
    """Whether it is one text whose vector was not finite: alone, and in float32."""


class Work:
    """n texts, cut into batches of equal work; results return to their rows by index."""

    def __init__(
        self,
        tokens: Tokens,
        prompt_length: int,
        role: Role,
        output: OutputInfo,
        padded: bool,
        errors: RowErrors,
        note: Callable[[int | None], None] | None = None,
    ) -> None:
        """`padded`: as `EngineInfo.padded`. Rows in `errors` have failed already and do not reach the model.

        `note`: as in `TokenizedGroup`; then each row is a batch, and the next waits until it is back.
        """
        lengths = tokens.lengths
        self.tokens = tokens
        self.vectors: npt.NDArray[np.float32] = np.zeros((len(lengths), output.dim), np.float32)
        self.computed: npt.NDArray[np.int64] = lengths.copy()
        """Tokens that the model computed for a row, padding included, [n]."""
        self.done: npt.NDArray[np.bool_] = np.zeros(len(lengths), np.bool_)
        self.errors = dict(errors)
        self._prompt_length = prompt_length
        self._role = role
        self._padded = padded
        self._normalized = output.normalized
        self.note = note
        self._lengths = lengths
        self._todo: deque[Rows] = deque()
        self._not_finite: deque[int] = deque()
        self._flying = 0
        self.done[list(errors)] = True

    def cut(self, budget: int) -> None:
        """Cut what waits for the model (at first: all that has not failed) into batches of at most `budget` tokens."""
        budget = budget if self.note is None else 1
        left = np.concatenate(self._todo) if self._todo else np.flatnonzero(~self.done)
        self._todo = deque(left[batch] for batch in cut_batches(self._lengths[left], budget, self._padded))

    def take(self) -> Taken:
        """The next batch, which is in the model until `land`, `again` or `fail` says what became of it."""
        exact = bool(self._not_finite)
        rows = np.array([self._not_finite.popleft()]) if exact else self._todo.popleft()
        self._flying += 1
        return Taken(rows, gather_batch(self.tokens, rows, self._prompt_length, self._role), exact)

    def land(self, taken: Taken, vectors: npt.NDArray[np.float32]) -> None:
        """A batch came back, [n, dim]. What embed-verify would refuse is an error; if not finite, at a second try."""
        rows = taken.rows
        bad = bad_vectors(vectors, self._normalized)
        finite = ~bad[Kind.NOT_FINITE]
        if taken.exact:
            self.computed[rows] += self._lengths[rows]
        elif self._padded:
            self.computed[rows] = self._lengths[rows].max()
        self._flying -= 1
        self.vectors[rows] = vectors
        if not finite.all():
            if taken.exact:
                self.errors[int(rows[0])] = ("not_finite", "the model gave a vector with NaN or infinity")
            else:
                self._not_finite.extend(rows[~finite].tolist())
                rows = rows[finite]
        self.errors |= dict.fromkeys(taken.rows[bad[Kind.ZERO]].tolist(), _ZERO)
        self.errors |= dict.fromkeys(taken.rows[bad[Kind.NORM]].tolist(), _NORM)
        self.done[rows] = True

    def again(self, pieces: Iterable[Rows]) -> None:
        """A batch did not come back: its pieces are next."""
        self._flying -= 1
        self._todo.extendleft(reversed(list(pieces)))

    def fail(self, row: int, code: str, message: str) -> None:
        """A batch of one text did not come back, and it is the text's fault."""
        self._flying -= 1
        self.errors[row] = (code, message)
        self.done[row] = True

    def stop(self) -> None:
        """Leave what is not in the model undone."""
        self._todo.clear()
        self._not_finite.clear()

    def cost(self, rows: Rows) -> int:
        """Tokens that the model computes for these rows as one batch."""
        return batch_cost(self._lengths[rows], self._padded)

    @property
    def waiting(self) -> bool:
        """Whether a batch waits to be taken."""
        return bool(self._todo or self._not_finite) and (self.note is None or not self._flying)

    @property
    def over(self) -> bool:
        """Whether nothing is left to run or to come back."""
        return not self.waiting and not self._flying

    @property
    def left(self) -> int:
        """Tokens that are not computed."""
        return int(self._lengths[~self.done].sum())

    @property
    def in_hand(self) -> InHand:
        """What is computed so far."""
        done = self.done
        return InHand(*map(int, (done.sum(), self._lengths[done].sum(), self.computed[done].sum())))
