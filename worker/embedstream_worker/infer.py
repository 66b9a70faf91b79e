"""Stage 3: batches of equal work through the model, as many at once as the engine wants.

Interactive requests go before the next batch. The next window's batches follow the last ones of this window without a
gap, so that the device never waits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import redis

from embedstream.errors import DeviceLost, ModelError
from embedstream.outputs import Kind
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines.base import Engine, OutOfMemory, OwnQueries, Results, Role, Tokens
from embedstream_worker.equal_texts import Begun, Recent
from embedstream_worker.held import EmbeddedGroup, RowErrors, TokenizedGroup
from embedstream_worker.landing import landing
from embedstream_worker.meter import Busy
from embedstream_worker.pipeline import Channel, Closed
from embedstream_worker.shared import Shared
from embedstream_worker.suspects import NotOurs
from embedstream_worker.work import Taken, Work

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a stage that waits for a slow writer, or for a slow batch, looks for more to do."""

SLOWEST = 20.0
"""A batch may be so many times slower than those before it: a long text costs many times more a token than short ones,
and other programs want the processor, too."""

FIRST = 10
"""So many times --stall-seconds where no batch has shown the pace yet, as for the warm-up that is left out then."""

SHORT_SECONDS = 0.1
"""What a batch may take, by the model's pace, while requests keep coming that have to wait for it ..."""

LEAST_SHORT_TOKENS = 256
"""... if it has more tokens than this: MiniLM in torch on a CPU takes 4 % longer a token in such batches than in those
of 2,048, and 20 % longer in those of 128."""

LAST_SECONDS = 5.0
"""After so long without such a request, batches are again as long as is fastest."""

WINDOWS = 2
"""Windows in this stage: the one whose last batches run, and the one that follows."""


@dataclass
class Urgent:
    """A small request that goes before the next batch. Its thread waits for `done`, which always comes."""

    tokens: Tokens
    prompt_length: int
    role: Role
    kinds: tuple[Kind, ...] = ("dense",)
    """Of results that are wanted, all of which the model gives."""
    queries: tuple[str, ...] = ()
    """In place of tokens: for `OwnQueries`."""
    prompt: str | None = None
    """Of these."""
    results: Results | None = None
    errors: RowErrors = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class _Window:
    """A window's groups, each with its work."""

    groups: list[Begun]

    @property
    def over(self) -> bool:
        return all(begun.work.over for begun in self.groups)

    def forget_notes(self) -> None:
        """No row of it is in the model any more. Twice is harmless."""
        for work in (begun.work for begun in self.groups):
            if work.note is not None:
                with contextlib.suppress(NotOurs):
                    work.note(None)
                work.note = None

    def embedded(self) -> list[EmbeddedGroup]:
        return [begun.embedded() for begun in self.groups]


class Infer:
    """Owns the engine: only its threads call `run`."""

    def __init__(
        self,
        shared: Shared,
        engine: Engine,
        batch_tokens: int,
        ahead: Ahead,
        source: Channel[list[TokenizedGroup] | Urgent],
        out: Channel[list[EmbeddedGroup]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._life, self._activity = shared.life, shared.activity
        self._meter, self._ledger = shared.meter, shared.ledger
        self._engine = engine
        self._budget = batch_tokens
        self._source = source
        self._out = out
        self._ahead = ahead
        ahead.told_by(lambda: self._left)
        self._stall_seconds = shared.settings.stall_seconds
        self._outputs = engine.info.outputs
        self._padded = engine.info.padded
        self._windows: deque[_Window] = deque()
        self._urgent: deque[tuple[Urgent, Work]] = deque()
        self._queries: deque[Urgent] = deque()
        self._flying: dict[Future[Results], tuple[Work, Taken, Begun | None]] = {}
        self._recent = Recent()
        self._busy = Busy()  # with batches of this stage alone: of another engine's, the meter counts them as well
        self._closed = False
        self._clock = clock
        self._waited = -math.inf  # when a request last came that batches of a window are in the way of
        self._short = False

    @property
    def _left(self) -> int:
        """Tokens of the windows in this stage that are not computed."""
        return sum(begun.work.left for window in list(self._windows) for begun in window.groups)

    @property
    def busy(self) -> bool:
        """Whether there are batches that a request would have to wait for."""
        return bool(self._flying)

    @property
    def budget(self) -> int:
        """Tokens of one batch: less than at first if the device had no memory for those."""
        return self._budget

    def run(self) -> None:
        """Until the source closes."""
        try:
            with ThreadPoolExecutor(self._engine.in_flight, "batch") as pool:
                while self._turn(pool):
                    pass
        finally:
            # No request may wait for an answer that will not come.
            self._source.close()
            while (request := self._source.take_first(Urgent)) is not None:
                request.done.set()
            for request in (*self._queries, *(request for request, _ in self._urgent)):
                request.done.set()

    def _turn(self, pool: ThreadPoolExecutor) -> bool:
        """Hand on what is over, fill the model, wait for a batch. Whether there is more to do."""
        if self._life.stopping.is_set():
            for window in self._windows:
                for group in window.groups:
                    group.work.stop()
        self._hand_on()
        self._adapt()
        while len(self._flying) < self._engine.in_flight and (chosen := self._next_work()) is not None:
            work, begun = chosen
            taken = work.take()
            self._flying[pool.submit(self._embed, work, taken)] = (work, taken, begun)
        if self._flying:
            free = len(self._flying) < self._engine.in_flight
            for future in wait(self._flying, LOOK_SECONDS if free else None, FIRST_COMPLETED).done:
                work, taken, of = self._flying.pop(future)
                self._settle(work, taken, future)
                if of is not None:
                    self._ledger.in_model(of.group, of.group.job.id, of.in_hand)
            self._answer()
        if self._queries and not self._flying:
            self._ask(self._queries.popleft())
        return bool(self._flying or self._windows or self._urgent or self._queries or not self._closed)

    def _adapt(self) -> None:
        """Cut what is left of the windows anew, into short batches while requests keep coming, else into usual ones."""
        short = self._clock() - self._waited < LAST_SECONDS
        if short != self._short:
            self._short = short
            for window in self._windows:
                for begun in window.groups:
                    begun.work.cut(self._size)

    @property
    def _size(self) -> int:
        """Tokens of a window's batches at present."""
        pace = self._ahead.tokens_per_second
        if not self._short or not pace:
            return self._budget
        return min(self._budget, max(LEAST_SHORT_TOKENS, int(pace * SHORT_SECONDS)))

    def _hand_on(self) -> None:
        """Give the writer the windows that are over; wait for it only when nothing else is to be done."""
        while self._windows and self._windows[0].over:
            self._windows[0].forget_notes()
            idle = not self._flying and all(window.over for window in self._windows)
            if not self._out.put(self._windows[0].embedded(), timeout=LOOK_SECONDS if idle else 0):
                return
            self._windows.popleft()

    def _next_work(self) -> tuple[Work, Begun | None] | None:
        """What the next batch comes from: requests first, then windows in their order, then a new window."""
        while (request := self._source.take_first(Urgent)) is not None:
            self._begin_urgent(request)
        if self._queries:
            return None  # the model is to be free for them
        for _, work in self._urgent:
            if work.waiting:
                return work, None
        for window in self._windows:
            for begun in window.groups:
                if begun.work.waiting:
                    return begun.work, begun
        if self._closed or len(self._windows) >= WINDOWS:
            return None
        try:
            # With nothing in the model and nothing to hand on there is nothing to do but wait.
            item = self._source.get(timeout=0 if self._flying or self._windows else None)
        except Closed:
            self._closed = True
            return None
        if isinstance(item, Urgent):
            self._begin_urgent(item)
        elif item is not None:
            self._windows.append(_Window([self._begin(group) for group in item]))
            self._ahead.arrived(sum(held.tokens for group in item for held in group.blocks))
        return None if item is None else self._next_work()

    def _embed(self, work: Work, taken: Taken) -> Results:
        if work.note is not None:
            work.note(int(taken.rows[0]))
        run = self._engine.run_exact if taken.exact else self._engine.run
        self._busy.begin()
        try:
            with self._activity.computing(self._allowed(taken)), self._meter.batch(len(taken.batch.ids)):
                return run(taken.batch)
        finally:
            self._busy.end()

    def _allowed(self, taken: Taken) -> float:
        """Seconds that a batch may take before the device counts as hung, by the pace of those before it."""
        pace = self._ahead.tokens_per_second
        return SLOWEST * len(taken.batch.ids) / pace if pace else FIRST * self._stall_seconds

    def _begin(self, group: TokenizedGroup) -> Begun:
        outputs = {output.kind: self._outputs[output.kind] for output in group.job.outputs}
        begun = Begun(group, outputs, self._padded, self._recent)
        begun.work.cut(self._size)
        if self._life.stopping.is_set():
            begun.work.stop()
        self._ledger.in_model(group, group.job.id, begun.in_hand)
        return begun

    def _begin_urgent(self, request: Urgent) -> None:
        if self._left:
            self._waited = self._clock()
        if request.queries:
            self._queries.append(request)
            return
        outputs = {kind: self._outputs[kind] for kind in request.kinds}
        work = Work(request.tokens, request.prompt_length, request.role, outputs, self._padded, {})
        work.cut(self._budget)
        self._urgent.append((request, work))
        self._answer()  # at once if it has no text

    def _ask(self, request: Urgent) -> None:
        """Queries that a model embeds in a way of its own, one at a time, while no batch is in it."""
        assert isinstance(self._engine, OwnQueries)
        landings = {kind: landing(kind, self._outputs[kind], len(request.queries)) for kind in request.kinds}
        for row, query in enumerate(request.queries):
            try:
                with self._activity.computing():
                    results = self._engine.query(query, request.prompt)
            except Exception as error:  # noqa: BLE001 - whatever it raises, a query must not end the worker
                if not isinstance(error, ModelError):
                    self._prove_alive()
                request.errors[row] = ("engine_error", str(error) or type(error).__name__)
                break
            for kind, place in landings.items():
                place.put(np.array([row]), results[kind])
        request.results = cast("Results", {kind: place.values() for kind, place in landings.items()})
        request.done.set()

    def _answer(self) -> None:
        for request, work in [pair for pair in self._urgent if pair[1].over]:
            request.results, request.errors = work.results(), work.errors
            self._urgent.remove((request, work))
            request.done.set()

    def _settle(self, work: Work, taken: Taken, future: Future[Results]) -> None:
        """What became of a batch; one that cannot be run is cut smaller, down to the one row that is the culprit."""
        error, rows = future.exception(), taken.rows
        if error is None:
            work.land(taken, future.result())
            self._ahead.computed(len(taken.batch.ids), self._busy.seconds)
            self._activity.progress()
        elif not isinstance(error, Exception) or isinstance(error, redis.RedisError):
            raise error
        elif isinstance(error, NotOurs):
            work.again([rows])
            work.stop()
        elif taken.exact:
            self._prove_alive()
            why = f"{type(error).__name__}: {error}"
            work.fail(int(rows[0]), "not_finite", f"the model gave NaN or infinity, and nothing in float32: {why}")
        elif isinstance(error, OutOfMemory):
            self._out_of_memory(work, taken, error)
        elif len(rows) > 1:
            # Whatever an engine raises is the fault of one of these texts.
            work.again((rows[: len(rows) // 2], rows[len(rows) // 2 :]))
        else:
            self._prove_alive()
            if not work.again_alone(int(rows[0])):
                work.fail(int(rows[0]), "engine_error", f"{type(error).__name__}: {error}")

    def _out_of_memory(self, work: Work, taken: Taken, error: OutOfMemory) -> None:
        """Halve the budget for good and cut what is left anew; a text that does not fit by itself is an error."""
        rows = taken.rows
        cost = work.cost(rows)
        if len(rows) == 1:
            self._prove_alive()
            if not work.again_alone(int(rows[0])):
                work.fail(int(rows[0]), "out_of_memory", f"a text of {cost} tokens does not fit: {error}")
            return
        self._budget = max(1, min(self._budget, cost) // 2)
        log.warning("no memory for a batch of %d tokens (%s); from now on %d at most", cost, error, self._budget)
        work.again([rows])
        work.cut(self._budget)

    def _prove_alive(self) -> None:
        """Before a text is blamed: does the engine still work at all? If not, the worker leaves.

        A device that has broken would otherwise turn a whole corpus into error rows, and quickly.

        Raises:
            DeviceLost: it does not.
        """
        try:
            with self._activity.computing():
                self._engine.warm_up(1)
        except Exception as error:
            raise DeviceLost(self._engine.info.device, error) from error
