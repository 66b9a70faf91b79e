"""Texts on their way through the model: what is left to run, what came of what ran. Touches no engine and no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from embedstream.outputs import Kind
from embedstream.verify.findings import Kind as Fault
from embedstream.verify.rows import bad_values
from embedstream_worker.batching import batch_cost, cut_batches, gather_batch
from embedstream_worker.engines.base import OutputInfo, Results, Role, TokenBatch, Tokens
from embedstream_worker.held import RowErrors
from embedstream_worker.landing import landing

Rows = npt.NDArray[np.int64]

CODES = {
    Fault.NOT_FINITE: "not_finite",
    Fault.ZERO: "zero_vector",
    Fault.NORM: "not_normalized",
    Fault.VALUES: "engine_error",
}
"""Of a text's error row, by what is wrong with its results."""

_MESSAGES = {
    Fault.ZERO: "the model gave a vector of zeros: it knows no part of the text",
    Fault.NORM: "the model gave a vector that cannot be brought to length 1",
    Fault.VALUES: "the model gave weights that are not above 0 or not in order",
}
"""Of what a second try does not mend."""


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
        outputs: Mapping[Kind, OutputInfo],
        padded: bool,
        errors: RowErrors,
        note: Callable[[int | None], None] | None = None,
    ) -> None:
        """`outputs`: the kinds of results that are wanted. `padded`: as `EngineInfo.padded`. Rows in `errors` have
        failed already and do not reach the model.

        `note`: as in `TokenizedGroup`; then each row is a batch, and the next waits until it is back.
        """
        lengths = tokens.lengths
        self.tokens = tokens
        self._outputs = dict(outputs)
        self._kinds = frozenset(outputs)
        self._landings = {kind: landing(kind, info, len(lengths)) for kind, info in outputs.items()}
        self.computed: npt.NDArray[np.int64] = lengths.copy()
        """Tokens that the model computed for a row, padding included, [n]."""
        self.done: npt.NDArray[np.bool_] = np.zeros(len(lengths), np.bool_)
        self.errors = dict(errors)
        self._prompt_length = prompt_length
        self._role = role
        self._padded = padded
        self.note = note
        self._lengths = lengths
        self._todo: deque[Rows] = deque()
        self._not_finite: deque[int] = deque()
        self._tried_alone: set[int] = set()
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
        return Taken(rows, gather_batch(self.tokens, rows, self._prompt_length, self._role, self._kinds), exact)

    def land(self, taken: Taken, results: Results) -> None:
        """A batch came back. What embed-verify would refuse is an error; if not finite, at a second try."""
        rows = taken.rows
        bad = self._bad(results, len(rows))
        finite = ~bad[Fault.NOT_FINITE]
        if taken.exact:
            self.computed[rows] += self._lengths[rows]
        elif self._padded:
            self.computed[rows] = self._lengths[rows].max()
        self._flying -= 1
        for kind, place in self._landings.items():
            place.put(rows, results[kind])
        if not finite.all():
            if taken.exact:
                self.errors[int(rows[0])] = (CODES[Fault.NOT_FINITE], "the model gave NaN or infinity")
            else:
                self._not_finite.extend(rows[~finite].tolist())
                rows = rows[finite]
        for fault, message in _MESSAGES.items():
            self.errors |= dict.fromkeys(taken.rows[bad[fault] & finite].tolist(), (CODES[fault], message))
        self.done[rows] = True

    def _bad(self, results: Results, rows: int) -> dict[Fault, npt.NDArray[np.bool_]]:
        """What is wrong with a batch's results, by kind of fault a mask [rows]."""
        bad = {fault: np.zeros(rows, np.bool_) for fault in CODES}
        for kind, info in self._outputs.items():
            found = bad_values(kind, results[kind], info.normalized, info.dim, alone=len(self._outputs) == 1)
            for fault, mask in found.items():
                bad[fault] |= mask
        return bad

    def results(self) -> Results:
        """By kind, of all rows; those of failed rows mean nothing."""
        return cast("Results", {kind: place.values() for kind, place in self._landings.items()})

    def again(self, pieces: Iterable[Rows]) -> None:
        """A batch did not come back: its pieces are next."""
        self._flying -= 1
        self._todo.extendleft(reversed(list(pieces)))

    def again_alone(self, row: int) -> bool:
        """A batch of one text did not come back. Whether it is tried again, as it is once: the fault may not be the
        text's."""
        if row in self._tried_alone:
            return False
        self._tried_alone.add(row)
        self.again([np.array([row])])
        return True

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
