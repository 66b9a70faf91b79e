"""Requests of many callers as few on the queue: what comes while others are under way goes together, as one batch."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from embedstream.api.embeddings import embeddings
from embedstream.api.interactive import MOST_TOKENIZED_BYTES, EmbedReply, EmbedRequest
from embedstream.errors import UsageError
from embedstream.tracing import Traces
from embedstream_gateway.fleet import LiveModel
from embedstream_gateway.observing import current_id, current_trace
from embedstream_gateway.refusals import Refusal, bad, overloaded, unavailable

PIECE_TEXTS = 256
PIECE_BYTES = 1024 * 1024
"""Of one request on the queue, a text that is longer excepted: a second or so of a worker's time, and well below the
queue's own bounds."""

PIECE_LARGE = 32
"""Texts where each has many numbers: weights, or a vector for each token. An answer is bounded, too."""

FLIGHTS_PER_WORKER = 2
"""Requests under way for each ready worker: while it computes one, it finds the next."""

MOST_FLIGHTS = 64
"""Over all models: each has a connection to Redis."""

MOST_WAITING_BYTES = 64 * 1024 * 1024
"""Of texts that wait here. Beyond it callers are told to come later."""


MOST_IDS = 16
"""Of requests that go together, which a worker's log can name."""


_TEXT = re.compile(r"^text (\d+)")
"""How workers and `EmbedRequest.check` name the text at fault."""


class Asker(Protocol):
    """Sends a request to a queue: `AsyncClient`."""

    async def ask(self, request: EmbedRequest, queue: str, timeout: float) -> EmbedReply | None: ...


@dataclass(frozen=True)
class Rows:
    """What a worker gave for n texts."""

    numbers: npt.NDArray[np.float32]
    """[n, dim]: vectors, scores (dim 1), or the scores of all labels; of an output that was asked for, [n, 0]."""
    tokens: npt.NDArray[np.uint32]
    """Of each text, [n]."""
    cut: tuple[int, ...]
    """Texts that were longer than the model takes."""
    fingerprint: str
    labels: tuple[str, ...] = ()
    outputs: tuple[Any, ...] = ()
    """Of each text: the one output that was asked for, a `SparseVector` or its tokens' vectors; or its `Token`s."""


@dataclass(eq=False)
class _Piece:
    """Some texts of one caller."""

    request: EmbedRequest
    first: int
    """Of the caller's texts."""
    size: int
    id: str
    """Of the caller's request."""
    trace: str
    """`Step.trace` of it."""
    done: asyncio.Future[Rows]


@dataclass
class _Lane:
    """Requests that may go together: the same queue and the same settings."""

    waiting: deque[_Piece] = field(default_factory=deque)
    flying: int = 0


class Gathering:
    """Sends for all callers of this process."""

    def __init__(self, asker: Asker, timeout: float, traces: Traces) -> None:
        """`timeout`: seconds from when a request goes to the queue."""
        self._traces = traces
        self._asker = asker
        self._timeout = timeout
        self._lanes: dict[tuple[str, EmbedRequest], _Lane] = {}
        self._flights = asyncio.Semaphore(MOST_FLIGHTS)
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, model: LiveModel, request: EmbedRequest) -> Rows:
        """Results of any number of texts, in their order.

        Raises:
            Refusal: too much waits; no worker answered in time; a text or a setting cannot be used.
            BrokerError: as `Asker.ask`.
        """
        about = {"embedstream.texts": len(request.texts)}
        with self._traces.step(f"ask {model.queue}", current_trace.get(), "client", about) as step:
            return await self._run(model, request, step.trace)

    async def _run(self, model: LiveModel, request: EmbedRequest, trace: str) -> Rows:
        loop, id = asyncio.get_running_loop(), current_id.get()
        pieces = [_Piece(part, first, size, id, trace, loop.create_future()) for part, first, size in _split(request)]
        total = sum(piece.size for piece in pieces)
        if self._bytes and self._bytes + total > MOST_WAITING_BYTES:
            raise overloaded("too many texts wait already: try again later")
        self._bytes += total
        try:
            async with asyncio.timeout(self._timeout):
                for piece in pieces:
                    self._add(model, piece)
                return _joined(await asyncio.gather(*(piece.done for piece in pieces)))
        except TimeoutError:
            waited = f"no answer of queue {model.queue} in {self._timeout:g} s"
            raise unavailable(f"{waited}: its workers are busy: try again, or start more") from None
        finally:
            self._bytes -= total
            for piece in pieces:
                piece.done.cancel()

    def _add(self, model: LiveModel, piece: _Piece) -> None:
        key = (model.queue, msgspec.structs.replace(piece.request, texts=()))
        lane = self._lanes.setdefault(key, _Lane())
        lane.waiting.append(piece)
        if lane.flying < FLIGHTS_PER_WORKER * len(model.workers):
            lane.flying += 1
            task = asyncio.create_task(self._fly(key, lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fly(self, key: tuple[str, EmbedRequest], lane: _Lane) -> None:
        """One request after another, until none waits."""
        try:
            async with self._flights:
                while pieces := _take(lane.waiting):
                    await self._send(key[0], pieces)
        finally:
            lane.flying -= 1
            if not lane.flying and not lane.waiting:
                self._lanes.pop(key, None)

    async def _send(self, queue: str, pieces: Sequence[_Piece]) -> None:
        texts = tuple(text for piece in pieces for text in piece.request.texts)
        ids = " ".join(dict.fromkeys(piece.id for piece in pieces[:MOST_IDS]))
        trace = " ".join(dict.fromkeys(piece.trace for piece in pieces if piece.trace))
        request = msgspec.structs.replace(pieces[0].request, texts=texts, id=ids, trace=trace)
        try:
            rows = _rows(await self._asker.ask(request, queue, self._timeout), request, queue, pieces[0].first)
        except Exception as raised:  # noqa: BLE001 - it is each caller's
            error = _fault(str(raised), pieces[0].first) if isinstance(raised, UsageError) else raised
            if len(pieces) > 1 and isinstance(error, Refusal) and error.status is HTTPStatus.BAD_REQUEST:
                for piece in pieces:  # one of them is at fault, and costs the others nothing but time
                    await self._send(queue, [piece])
                return
            for piece in pieces:
                if not piece.done.done():
                    piece.done.set_exception(error)
            return
        first = 0
        for piece in pieces:
            end = first + len(piece.request.texts)
            if not piece.done.done():
                piece.done.set_result(_slice(rows, first, end))
            first = end


def _split(request: EmbedRequest) -> Iterator[tuple[EmbedRequest, int, int]]:
    """Pieces, the place of their first text, and their bytes. Pairs stay together: their query would go with each."""
    texts: list[str] = []
    first, size, most, most_bytes = 0, 0, _most_texts(request), _most_bytes(request)
    for at, text in enumerate(request.texts):
        length = len(text.encode())
        if texts and request.query is None and (len(texts) == most or size + length > most_bytes):
            yield msgspec.structs.replace(request, texts=tuple(texts)), first, size
            texts, first, size = [], at, 0
        texts.append(text)
        size += length
    yield msgspec.structs.replace(request, texts=tuple(texts)), first, size


def _most_texts(request: EmbedRequest) -> int:
    return PIECE_LARGE if request.outputs else PIECE_TEXTS


def _most_bytes(request: EmbedRequest) -> int:
    return MOST_TOKENIZED_BYTES if request.task == "tokenize" else PIECE_BYTES


def _take(waiting: deque[_Piece]) -> list[_Piece]:
    """The next pieces that go together; those whose callers have left are dropped."""
    taken: list[_Piece] = []
    texts = size = 0
    while waiting:
        piece = waiting[0]
        texts, size = texts + len(piece.request.texts), size + piece.size
        if taken and (texts > _most_texts(piece.request) or size > _most_bytes(piece.request)):
            break
        waiting.popleft()
        if not piece.done.done():
            taken.append(piece)
    return taken


def _rows(reply: EmbedReply | None, request: EmbedRequest, queue: str, first: int) -> Rows:
    """Raises `Refusal`. `first`: the place of the first text among those of its caller."""
    if reply is None:
        raise unavailable(f"no worker of queue {queue} has answered: they are busy, or have left: try again")
    if reply.error and reply.internal:
        raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"the worker failed: {reply.error}", "worker_failed")
    if reply.error:
        raise _fault(reply.error, first)
    count = len(request.texts)
    if request.task == "tokenize" and len(reply.tokenized) == count and len(reply.counts) == 4 * count:
        tokens = np.frombuffer(reply.counts, "<u4")
        return Rows(np.zeros((count, 0), np.float32), tokens, (), reply.fingerprint, outputs=reply.tokenized)
    if request.outputs and len(reply.counts) == 4 * count:
        (output,) = embeddings(reply, request).values()
        tokens = np.frombuffer(reply.counts, "<u4")
        return Rows(np.zeros((count, 0), np.float32), tokens, reply.cut, reply.fingerprint, outputs=tuple(output))
    if reply.dim < 1 or len(reply.vectors) != 4 * count * reply.dim or len(reply.counts) != 4 * count:
        raise Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"a worker of queue {queue} answered {len(reply.vectors)} bytes for {count} rows of {reply.dim}, with "
            f"{len(reply.counts)} bytes of counts: upgrade the workers",
            "worker_failed",
        )
    numbers = np.frombuffer(reply.vectors, "<f4").reshape(count, reply.dim)
    return Rows(numbers, np.frombuffer(reply.counts, "<u4"), reply.cut, reply.fingerprint, reply.labels)


def _fault(message: str, first: int) -> Refusal:
    """What is wrong with a request. `first`: as of `_rows`."""
    return bad(_TEXT.sub(lambda found: f"text {first + int(found[1])}", message), "input")


def _slice(rows: Rows, first: int, end: int) -> Rows:
    cut = tuple(place - first for place in rows.cut if first <= place < end)
    numbers, tokens, outputs = rows.numbers[first:end], rows.tokens[first:end], rows.outputs[first:end]
    return Rows(numbers, tokens, cut, rows.fingerprint, rows.labels, outputs)


def _joined(pieces: Sequence[Rows]) -> Rows:
    """Raises `Refusal` if they are of several models: what is in one answer can be compared."""
    if len(pieces) == 1:
        return pieces[0]
    if len({piece.fingerprint for piece in pieces}) > 1:
        raise unavailable("workers of different models answer on this queue: try again when the old ones have left")
    starts = np.cumsum([0, *(len(piece.tokens) for piece in pieces)]).tolist()
    return Rows(
        np.concatenate([piece.numbers for piece in pieces]),
        np.concatenate([piece.tokens for piece in pieces]),
        tuple(start + place for start, piece in zip(starts, pieces, strict=False) for place in piece.cut),
        pieces[0].fingerprint,
        pieces[0].labels,
        tuple(output for piece in pieces for output in piece.outputs),
    )
