"""The small requests: claimed by their own thread, put before the next batch, answered."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Protocol

import msgspec
import numpy as np

from embedstream.api.interactive import KIND_OF, EmbedReply, EmbedRequest, refuse_long_body
from embedstream.dataset.input_hash import model_inputs
from embedstream.errors import ModelError, UsageError
from embedstream.queue.broker import Claimed
from embedstream.server.patience import Refused, Stopped
from embedstream_worker.batching import join_tokens
from embedstream_worker.engines.base import Engine, TextTokenizer
from embedstream_worker.giving import GIVES
from embedstream_worker.held import hand_back
from embedstream_worker.infer import Urgent
from embedstream_worker.pipeline import Closed
from embedstream_worker.shared import Shared
from embedstream_worker.troubles import patience

log = logging.getLogger(__name__)

REQUESTS_PER_CLAIM = 8
"""Requests taken at once; more workers share what is left."""

WAIT_MS = 1000
"""How long one read waits: how late a stop is seen."""

NO_STREAM_SECONDS = 0.1
"""How often the stream of requests is looked for while nobody ever asked: how late the first one is seen."""

MOST_DELIVERIES = 2
"""A request that outlived so many workers is not tried again."""

REPLY_KEEP_MS = 60_000
"""How long a reply waits to be read."""


class TakesRequests(Protocol):
    """The stage with the model, or a way to it."""

    def put_first(self, item: Urgent, /) -> None:
        """Raises `Closed` if the stage has ended."""


class Interactive:
    """Owns its tokenizer and its connection, which must not repeat commands by itself (see `Intake`)."""

    def __init__(self, shared: Shared, engine: Engine, tokenizer: TextTokenizer, infer: TakesRequests) -> None:
        self._broker = shared.broker(0)
        self._consumer, self._life, self._activity = shared.consumer, shared.life, shared.activity
        self._lease_ms = int(shared.settings.lease_seconds * 1000)
        self._engine = engine
        self._tokenizer = tokenizer
        self._infer = infer
        self._unsure = False  # whether something may be claimed and not answered

    def run(self) -> None:
        """Until the worker stops; requests that it has not answered then go back."""
        answering = patience("answering requests", self._life.stopping.wait)
        with suppress(Closed, Stopped):
            while not self._life.stopping.is_set():
                answering(self._round)
        if self._life.failure is not None:
            return  # perhaps a request was the cause: it must not be the next worker's at once
        try:
            self._hand_all_back()
        except Refused as error:
            log.warning("could not hand requests back (%s): their lease will expire", error)

    def _round(self) -> None:
        if self._unsure:
            self._hand_all_back()
        self._unsure = True
        for request in self._claim():
            self._serve(request)
        self._unsure = False

    def _claim(self) -> list[Claimed]:
        begun = time.monotonic()
        claimed = self._broker.sweep_requests(self._consumer, self._lease_ms, REQUESTS_PER_CLAIM)
        claimed = claimed or self._broker.claim_requests(self._consumer, REQUESTS_PER_CLAIM, WAIT_MS)
        if not claimed and time.monotonic() - begun < NO_STREAM_SECONDS:
            self._life.stopping.wait(NO_STREAM_SECONDS)
        return claimed

    def _hand_all_back(self) -> None:
        """Whatever is still pending for this worker was claimed and not answered, or its claim was never heard of."""
        stream = self._broker.keys.interactive
        hand_back(self._broker, stream, self._consumer, self._broker.pending(stream, self._consumer))

    def _serve(self, claimed: Claimed) -> None:
        """Raises `Closed` if the model's stage has ended."""
        name = claimed.fields.get(b"request", b"").decode("utf-8", "replace")
        reply = EmbedReply(error="its caller has left")
        if claimed.deliveries > MOST_DELIVERIES:
            reply = EmbedReply(
                error=f"{claimed.deliveries - 1} workers died of this request, or while they had it", internal=True
            )
        elif self._broker.is_awaited(name):
            reply = self._answer(claimed.fields.get(b"body", b""))
        payload = msgspec.msgpack.encode(reply)
        self._broker.run(self._broker.reply(name, claimed.entry, payload, REPLY_KEEP_MS))

    def _answer(self, body: bytes) -> EmbedReply:
        id = ""
        try:
            refuse_long_body(body)
            request = msgspec.msgpack.decode(body, type=EmbedRequest)
            id = request.id
            return self._embed(request)
        except (msgspec.MsgspecError, ModelError, UsageError) as error:
            return EmbedReply(error=str(error))
        except Closed:
            raise
        except Exception as error:  # noqa: BLE001 - a request must not end the worker, nor the next that is asked
            log.warning("request %s could not be embedded: %s: %s", id or "(no id)", type(error).__name__, error)
            return EmbedReply(error=f"{type(error).__name__}: {error}", internal=True)

    def _embed(self, request: EmbedRequest) -> EmbedReply:
        request.check()
        info = self._engine.info
        kind, query = KIND_OF[request.task], request.query
        if kind not in info.outputs:
            given = ", ".join(GIVES[each] for each in info.outputs)
            raise ModelError(f"{request.task}() needs a model that gives {GIVES[kind]}, this one gives {given}")
        # Pairs have no prompt, as in jobs.
        prompt = "" if query else self._engine.prompt(request.role, request.prompt, request.prompt_name)
        max_length = request.max_length or info.max_length
        with self._activity.computing():
            pieces = [
                self._tokenizer.encode(inputs, max_length, [query] * len(inputs) if query else None)
                for inputs in model_inputs(request.texts, prompt)
            ]
            prompt_length = self._tokenizer.prompt_length(prompt, max_length) if prompt else 0
        tokens = join_tokens(pieces)
        urgent = Urgent(tokens, prompt_length, request.role, (kind,))
        self._infer.put_first(urgent)
        urgent.done.wait()
        if urgent.results is None:
            raise Closed
        if urgent.errors:
            row, (code, message) = next(iter(urgent.errors.items()))
            return EmbedReply(error=f"text {row}: {code}: {message}")
        return EmbedReply(
            kind=kind,
            dim=info.outputs[kind].dim,
            vectors=np.ascontiguousarray(urgent.results[kind], dtype="<f4").tobytes(),
            labels=info.outputs[kind].labels,
            tokens=int(tokens.lengths.sum()),
            truncated=int(tokens.truncated.sum()),
            counts=tokens.lengths.astype("<u4").tobytes(),
            cut=tuple(np.flatnonzero(tokens.truncated).tolist()),
            fingerprint=info.fingerprint,
        )
