"""Stage 3: batches of equal work through the model. Interactive requests go before the next batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedstream.broker import InHand
from embedstream_worker.batching import batch_cost, cut_batches, gather_batch
from embedstream_worker.engines.base import Engine, OutOfMemory, Role, Tokens
from embedstream_worker.held import EmbeddedGroup, RowErrors, TokenizedGroup
from embedstream_worker.pipeline import Channel, Closed, Life

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a stage that waits for a slow writer looks for interactive requests."""

Rows = npt.NDArray[np.int64]


@dataclass
class Urgent:
    """A small request that goes before the next batch. Its thread waits for `done`, which always comes."""

    tokens: Tokens
    prompt_length: int
    role: Role
    vectors: npt.NDArray[np.float32] | None = None
    errors: RowErrors = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Work:
    """Texts on their way through the model."""

    tokens: Tokens
    prompt_length: int
    role: Role
    vectors: npt.NDArray[np.float32]
    computed: npt.NDArray[np.int64]
    done: npt.NDArray[np.bool_]
    errors: RowErrors
    todo: deque[Rows]

    def fail(self, row: int, code: str, message: str) -> None:
        self.errors[row] = (code, message)
        self.done[row] = True


class Infer:
    """Owns the engine: only its thread calls `embed`."""

    def __init__(
        self,
        engine: Engine,
        batch_tokens: int,
        life: Life,
        source: Channel[list[TokenizedGroup] | Urgent],
        out: Channel[list[EmbeddedGroup]],
    ) -> None:
        self._engine = engine
        self._budget = batch_tokens
        self._life = life
        self._source = source
        self._out = out
        self._name, self._output = next(iter(engine.info.outputs.items()))
        self._padded = engine.info.padded
        self._in_hand = ("", InHand())

    @property
    def in_hand(self) -> tuple[str, InHand]:
        """The job in the model, and what is computed of its part of the window."""
        return self._in_hand

    @property
    def budget(self) -> int:
        """Tokens of one batch: less than at first if the device had no memory for those."""
        return self._budget

    def run(self) -> None:
        """Until the source closes."""
        try:
            while True:
                item = self._source.get()
                if isinstance(item, Urgent):
                    self._serve(item)
                elif item is not None:
                    self._hand_on([self._embed_group(group) for group in item])
                    self._in_hand = ("", InHand())
        except Closed:
            raise
        except BaseException as error:
            self._life.fail(error)  # before anybody is told that there is no answer
            raise
        finally:
            self._source.close()
            while (request := self._source.take_first(Urgent)) is not None:
                request.done.set()

    def _hand_on(self, groups: list[EmbeddedGroup]) -> None:
        while not self._out.put(groups, timeout=LOOK_SECONDS):
            self._serve_urgent()

    def _serve_urgent(self) -> None:
        while (request := self._source.take_first(Urgent)) is not None:
            self._serve(request)

    def _serve(self, request: Urgent) -> None:
        try:
            work = self._begin(request.tokens, request.prompt_length, request.role, {})
            while work.todo:
                self._embed_next(work)
            request.vectors, request.errors = work.vectors, work.errors
        finally:
            request.done.set()

    def _embed_group(self, group: TokenizedGroup) -> EmbeddedGroup:
        """Whole, or up to the batch during which the worker was told to stop."""
        job = group.job
        work = self._begin(group.tokens, job.prompt_length, job.spec.role, group.errors)
        while work.todo and not self._life.stopping.is_set():
            self._serve_urgent()
            self._embed_next(work)
            self._life.progress()
            done = work.done
            sums = (done.sum(), work.tokens.lengths[done].sum(), work.computed[done].sum())
            self._in_hand = (job.id, InHand(*map(int, sums)))
        return EmbeddedGroup(group, work.vectors, work.computed, work.done, work.errors)

    def _begin(self, tokens: Tokens, prompt_length: int, role: Role, errors: RowErrors) -> _Work:
        lengths = tokens.lengths
        done = np.zeros(len(lengths), np.bool_)
        done[list(errors)] = True
        return _Work(
            tokens=tokens,
            prompt_length=prompt_length,
            role=role,
            vectors=np.zeros((len(lengths), self._output.dim), np.float32),
            computed=lengths.copy(),
            done=done,
            errors=dict(errors),
            todo=deque(self._cut(np.flatnonzero(~done), lengths)),
        )

    def _cut(self, rows: Rows, lengths: npt.NDArray[np.int64]) -> list[Rows]:
        return [rows[batch] for batch in cut_batches(lengths[rows], self._budget, self._padded)]

    def _embed_next(self, work: _Work) -> None:
        """Run the next batch; what it cannot be run with is cut smaller, down to the one row that is the culprit."""
        rows = work.todo.popleft()
        batch = gather_batch(work.tokens, rows, work.prompt_length, work.role)
        try:
            result = self._engine.embed(batch)[self._name]
        except OutOfMemory as error:
            if len(rows) > 1:
                self._halve(rows, work, error)
                return
            self._prove_alive()
            work.fail(int(rows[0]), "out_of_memory", f"a text of {batch.longest} tokens does not fit: {error}")
            return
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is the fault of one of these texts
            if len(rows) > 1:
                work.todo.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
                return
            self._prove_alive()
            work.fail(int(rows[0]), "engine_error", f"{type(error).__name__}: {error}")
            return
        work.vectors[rows] = result
        work.done[rows] = True
        if self._padded:
            work.computed[rows] = batch.longest
        for row in rows[~np.isfinite(result).all(axis=1)].tolist():
            work.fail(row, "not_finite", "the model gave a vector with NaN or infinity")

    def _prove_alive(self) -> None:
        """Before a text is blamed: does the engine still work at all? If not, it raises, and the worker leaves.

        A device that has broken would otherwise turn a whole corpus into error rows, and quickly.
        """
        self._engine.warm_up(1)

    def _halve(self, rows: Rows, work: _Work, error: OutOfMemory) -> None:
        """Halve the budget for good and cut what is left anew."""
        lengths = work.tokens.lengths
        cost = batch_cost(lengths[rows], self._padded)
        self._budget = max(1, min(self._budget, cost) // 2)
        log.warning("no memory for a batch of %d tokens (%s); from now on %d at most", cost, error, self._budget)
        left = np.concatenate([rows, *work.todo])
        work.todo.clear()
        work.todo.extend(self._cut(left, lengths))
