"""The small requests: claimed by their own thread, put before the next batch, answered."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.broker import Broker, Claimed
from embedstream.errors import ModelError
from embedstream.interactive import EmbedReply, EmbedRequest
from embedstream_worker.engines.base import Engine, TextTokenizer
from embedstream_worker.held import TokenizedGroup
from embedstream_worker.infer import Urgent
from embedstream_worker.pipeline import Channel, Life

log = logging.getLogger(__name__)

REQUESTS_PER_CLAIM = 8
"""Requests taken at once; more workers share what is left."""

WAIT_MS = 1000
"""How long one read waits: how late a stop is seen."""

REPLY_KEEP_MS = 60_000
"""How long a reply waits to be read."""


class Interactive:
    """Owns its tokenizer and its connection."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        broker: Broker,
        consumer: str,
        life: Life,
        infer: Channel[list[TokenizedGroup] | Urgent],
        lease_ms: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._broker = broker
        self._consumer = consumer
        self._life = life
        self._infer = infer
        self._lease_ms = lease_ms
        self._output = next(iter(engine.info.outputs))

    def run(self) -> None:
        """Until the worker stops."""
        backoff, failures = ExponentialWithJitterBackoff(base=0.1, cap=5.0), 0
        while not self._life.stopping.is_set():
            try:
                claimed = self._broker.sweep_requests(self._consumer, self._lease_ms, REQUESTS_PER_CLAIM)
                claimed = claimed or self._broker.claim_requests(self._consumer, REQUESTS_PER_CLAIM, WAIT_MS)
                for request in claimed:
                    self._serve(request)
                failures = 0
            except (redis.ConnectionError, redis.TimeoutError) as error:
                failures += 1
                log.warning("Redis cannot be reached (%s), trying again", error)
                self._life.stopping.wait(backoff.compute(failures))

    def _serve(self, claimed: Claimed) -> None:
        name = claimed.fields.get(b"request", b"").decode("utf-8", "replace")
        try:
            reply = self._embed(msgspec.msgpack.decode(claimed.fields.get(b"body", b""), type=EmbedRequest))
        except (msgspec.MsgspecError, ModelError) as error:
            reply = EmbedReply(error=str(error))
        payload = msgspec.msgpack.encode(reply)
        self._broker.run(self._broker.reply(name, claimed.entry, payload, REPLY_KEEP_MS))

    def _embed(self, request: EmbedRequest) -> EmbedReply:
        info = self._engine.info
        prompt = self._engine.prompt(request.role, request.prompt, request.prompt_name)
        max_length = min(request.max_length or info.max_length, info.max_length)
        tokens = self._tokenizer.encode([prompt + text for text in request.texts], max_length)
        prompt_length = self._tokenizer.prompt_length(prompt, max_length) if prompt else 0
        urgent = Urgent(tokens, prompt_length, request.role)
        self._infer.put_first(urgent)
        while not urgent.done.wait(timeout=1.0):
            if self._infer.closed:
                return EmbedReply(error="the worker is leaving; ask again")
        if urgent.failure is not None or urgent.vectors is None:
            return EmbedReply(error=f"the model failed: {urgent.failure}")
        if urgent.errors:
            row, (code, message) = next(iter(urgent.errors.items()))
            return EmbedReply(error=f"text {row}: {code}: {message}")
        return EmbedReply(
            dim=info.outputs[self._output].dim,
            vectors=np.ascontiguousarray(urgent.vectors, dtype="<f4").tobytes(),
            tokens=int(tokens.lengths.sum()),
            truncated=int(tokens.truncated.sum()),
            fingerprint=info.fingerprint,
        )
