"""Stage 3: batches of equal work through the model. Interactive requests go before the next batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedstream_worker.batching import cut_batches
from embedstream_worker.engines.base import Engine, OutOfMemory, Role, TokenBatch, Tokens
from embedstream_worker.held import EmbeddedGroup, TokenizedGroup
from embedstream_worker.pipeline import Channel, Life

log = logging.getLogger(__name__)


@dataclass
class Urgent:
    """A small request that goes before the next batch. Its thread waits for `done`."""

    tokens: Tokens
    prompt_length: int
    role: Role
    vectors: npt.NDArray[np.float32] | None = None
    errors: dict[int, tuple[str, str]] = field(default_factory=dict)
    failure: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


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

    def run(self) -> None:
        """Until the source closes."""
        while True:
            item = self._source.get()
            if isinstance(item, Urgent):
                self._serve(item)
            elif item is not None:
                self._out.put([self._embed_group(group) for group in item])

    def _serve(self, request: Urgent) -> None:
        try:
            request.vectors, _, request.errors = self._embed(request.tokens, request.prompt_length, request.role)
        except BaseException as error:
            request.failure = error
            raise
        finally:
            request.done.set()

    def _embed_group(self, group: TokenizedGroup) -> EmbeddedGroup:
        vectors, computed, errors = self._embed(group.tokens, group.prompt_length, group.job.spec.role, bulk=True)
        return EmbeddedGroup(group, vectors, computed, errors)

    def _embed(
        self, tokens: Tokens, prompt_length: int, role: Role, bulk: bool = False
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], dict[int, tuple[str, str]]]:
        """Vectors [n, dim] in the order of `tokens`, computed tokens [n], and errors by row."""
        lengths = tokens.lengths
        vectors = np.zeros((len(lengths), self._output.dim), np.float32)
        computed = lengths.copy()
        errors: dict[int, tuple[str, str]] = {}
        todo = deque(cut_batches(lengths, self._budget, self._engine.info.padded))
        while todo:
            if bulk:
                while (request := self._source.take_first(Urgent)) is not None:
                    self._serve(request)
            rows = todo.popleft()
            batch = take(tokens, rows, prompt_length, role)
            try:
                result = self._engine.embed(batch)[self._name]
            except OutOfMemory as error:
                self._out_of_memory(rows, lengths, error, todo, errors)
                continue
            except Exception as error:  # noqa: BLE001 - whatever an engine raises is the fault of one of these texts
                if len(rows) > 1:
                    todo.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
                else:
                    errors[int(rows[0])] = ("engine_error", f"{type(error).__name__}: {error}")
                continue
            vectors[rows] = result
            if self._engine.info.padded:
                computed[rows] = batch.longest
            for row in rows[~np.isfinite(result).all(axis=1)]:
                errors[int(row)] = ("not_finite", "the model gave a vector with NaN or infinity")
            self._life.progress()
        return vectors, computed, errors

    def _out_of_memory(
        self,
        rows: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        error: OutOfMemory,
        todo: deque[npt.NDArray[np.int64]],
        errors: dict[int, tuple[str, str]],
    ) -> None:
        """Halve the budget for good and cut what is left anew; a text that is alone and does not fit is an error."""
        if len(rows) == 1:
            errors[int(rows[0])] = ("out_of_memory", f"a text of {lengths[rows[0]]} tokens does not fit: {error}")
            return
        padded = self._engine.info.padded
        cost = len(rows) * int(lengths[rows].max()) if padded else int(lengths[rows].sum())
        self._budget = max(1, min(self._budget, cost) // 2)
        log.warning("the device has no memory for a batch of %d tokens; from now on %d", cost, self._budget)
        left = np.concatenate([rows, *todo])
        todo.clear()
        todo.extend(left[batch] for batch in cut_batches(lengths[left], self._budget, padded))


def take(tokens: Tokens, rows: npt.NDArray[np.int64], prompt_length: int, role: Role) -> TokenBatch:
    """The batch of these rows, in this order."""
    starts, lengths = tokens.offsets[rows], tokens.lengths[rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return TokenBatch(tokens.ids[index], offsets, int(lengths.max(initial=0)), prompt_length, role)
