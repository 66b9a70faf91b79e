"""The small requests: claimed by their own thread, put before the next batch, answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
import numpy as np
import pyarrow as pa

from embedstream.api.interactive import (
    KIND_OF,
    MOST_REPLY_BYTES,
    EmbedReply,
    EmbedRequest,
    ReplyOutput,
    refuse_long_body,
)
from embedstream.dataset.input_hash import model_inputs
from embedstream.dataset.redis_values import to_fields
from embedstream.dataset.schema import output_fields
from embedstream.dataset.values import to_columns
from embedstream.errors import ModelError, UsageError
from embedstream.outputs import Output
from embedstream.queue.broker import Claimed
from embedstream.server.patience import Refused, Stopped
from embedstream.tracing import Attributes, Traces
from embedstream.verify.rows import WORDS, bad_column
from embedstream_worker.batching import join_tokens
from embedstream_worker.cutting import SpanTokenizer
from embedstream_worker.engines.base import Engine, OwnQueries, Results, TextTokenizer, Tokens
from embedstream_worker.giving import GIVES, resolve_output
from embedstream_worker.held import hand_back
from embedstream_worker.infer import Urgent
from embedstream_worker.pipeline import Closed
from embedstream_worker.shared import Shared
from embedstream_worker.troubles import patience
from embedstream_worker.work import CODES

log = logging.getLogger(__name__)

REQUESTS_PER_CLAIM = 8
"""Requests taken at once; more workers share what is left."""

WAIT_MS = 1000
"""How long one read waits: how late a stop is seen."""

NO_STREAM_SECONDS = 0.1
"""How often the stream of requests is looked for while no client ever asked: how late the first one is seen."""

MOST_DELIVERIES = 2
"""A request that outlived so many workers is not tried again."""

MOST_OWN_QUERIES = 64
"""To a model that takes them one at a time."""

REPLY_KEEP_MS = 60_000
"""How long a reply waits to be read."""


class TakesRequests(Protocol):
    """The stage with the model, or a way to it."""

    def put_first(self, item: Urgent, /) -> None:
        """Raises `Closed` if the stage has ended."""


class Interactive:
    """Owns its tokenizer and its connection, which must not repeat commands by itself (see `Intake`)."""

    def __init__(
        self, shared: Shared, engine: Engine, tokenizer: TextTokenizer, infer: TakesRequests, traces: Traces
    ) -> None:
        self._traces = traces
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
            reply = self._answer(claimed)
        payload = msgspec.msgpack.encode(reply)
        self._broker.run(self._broker.reply(name, claimed.entry, payload, REPLY_KEEP_MS))

    def _answer(self, claimed: Claimed) -> EmbedReply:
        body, id = claimed.fields.get(b"body", b""), ""
        try:
            refuse_long_body(body)
            request = msgspec.msgpack.decode(body, type=EmbedRequest)
            id = request.id
            request.check()
            return self._traced(request, claimed.entry)
        except (msgspec.MsgspecError, ModelError, UsageError) as error:
            return EmbedReply(error=str(error))
        except Closed:
            raise
        except Exception as error:  # noqa: BLE001 - a request must not end the worker, nor the next that is asked
            log.warning("request %s could not be embedded: %s: %s", id or "(no id)", type(error).__name__, error)
            return EmbedReply(error=f"{type(error).__name__}: {error}", internal=True)

    def _traced(self, request: EmbedRequest, entry: str) -> EmbedReply:
        queue = self._broker.queue
        about: Attributes = {"embedstream.texts": len(request.texts), "embedstream.request_id": request.id}
        self._traces.passed(f"wait in {queue}", request.trace, begun_ns=1_000_000 * int(entry.partition("-")[0]))
        with self._traces.step(f"{request.task} {queue}", request.trace, "consumer", about) as step:
            if request.task == "tokenize":
                return self._tokenized(request)
            reply = self._embed(request, step.trace)
            step.tell({"embedstream.tokens": reply.tokens})
            return reply

    def _tokenized(self, request: EmbedRequest) -> EmbedReply:
        if not isinstance(self._tokenizer, SpanTokenizer):
            raise ModelError("the model's tokenizer is written in Python, and does not say where tokens are")
        prompt = self._engine.prompt(request.role, request.prompt, request.prompt_name)
        inputs = [prompt + text for text in request.texts]
        with self._activity.computing():
            tokenized = tuple(self._tokenizer.spelled(inputs, request.add_special_tokens))
        counts = np.array([len(tokens) for tokens in tokenized], "<u4")
        return EmbedReply(
            tokenized=tokenized,
            tokens=int(counts.sum()),
            counts=counts.tobytes(),
            fingerprint=self._engine.info.fingerprint,
        )

    def _embed(self, request: EmbedRequest, trace: str) -> EmbedReply:
        info = self._engine.info
        kind, query = KIND_OF[request.task], request.query
        outputs = [resolve_output(each, "this model", info.outputs) for each in request.outputs]
        if not outputs and kind not in info.outputs:
            given = ", ".join(GIVES[each] for each in info.outputs)
            raise ModelError(f"{request.task}() needs a model that gives {GIVES[kind]}, this one gives {given}")
        if self._asks_by_itself(request):
            return self._asked(request, outputs, trace)
        # Pairs have no prompt, as in jobs.
        prompt = "" if query else self._engine.prompt(request.role, request.prompt, request.prompt_name)
        max_length = request.max_length or info.max_length
        with self._activity.computing(), self._traces.step("split into tokens", trace):
            pieces = [
                self._tokenizer.encode(inputs, max_length, [query] * len(inputs) if query else None)
                for inputs in model_inputs(request.texts, prompt)
            ]
            prompt_length = self._tokenizer.prompt_length(prompt, max_length) if prompt else 0
        tokens = join_tokens(pieces)
        kinds = tuple(dict.fromkeys(output.kind for output in outputs)) or (kind,)
        urgent = Urgent(tokens, prompt_length, request.role, kinds)
        results = self._run(urgent, trace)
        vectors = b"" if outputs else np.ascontiguousarray(results[kind], dtype="<f4").tobytes()
        return EmbedReply(
            kind=kind,
            dim=0 if outputs else info.outputs[kind].dim,
            vectors=vectors,
            outputs=reply_outputs(outputs, results),
            labels=() if outputs else info.outputs[kind].labels,
            tokens=int(tokens.lengths.sum()),
            truncated=int(tokens.truncated.sum()),
            counts=tokens.lengths.astype("<u4").tobytes(),
            cut=tuple(np.flatnonzero(tokens.truncated).tolist()),
            fingerprint=info.fingerprint,
        )

    def _asks_by_itself(self, request: EmbedRequest) -> bool:
        """Whether the texts are queries to a model that embeds these in a way of its own. One that gives dense vectors,
        too, embeds them as documents."""
        own = isinstance(self._engine, OwnQueries) and "dense" not in self._engine.info.outputs
        return own and request.task == "embed" and request.role == "query"

    def _asked(self, request: EmbedRequest, outputs: Sequence[Output], trace: str) -> EmbedReply:
        """Queries to such a model. Its library cuts them, and does not say so."""
        if request.prompt_name is not None or request.max_length is not None:
            raise ModelError("queries to this model take neither prompt_name nor max_length: its library decides")
        if len(request.texts) > MOST_OWN_QUERIES:
            raise ModelError(f"{len(request.texts)} queries in one request: at most {MOST_OWN_QUERIES} to this model")
        nothing = Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.bool_))
        kinds = tuple(dict.fromkeys(output.kind for output in outputs))
        results = self._run(Urgent(nothing, 0, "query", kinds, queries=request.texts, prompt=request.prompt), trace)
        return EmbedReply(outputs=reply_outputs(outputs, results), fingerprint=self._engine.info.fingerprint)

    def _run(self, urgent: Urgent, trace: str) -> Results:
        """Raises `Closed` if the model's stage has ended, and `ModelError` if a text failed."""
        with self._traces.step("run the model", trace):
            self._infer.put_first(urgent)
            urgent.done.wait()
        if urgent.results is None:
            raise Closed
        if urgent.errors:
            row, (code, message) = next(iter(urgent.errors.items()))
            raise ModelError(f"text {row}: {code}: {message}")
        return urgent.results


def reply_outputs(outputs: Sequence[Output], results: Results) -> tuple[ReplyOutput, ...]:
    """Results as a reply has them. Raises `ModelError` for numbers that a dataset would have as an error row, and for
    more than an answer may have."""
    made, size = [], 0
    for output in outputs:
        columns = to_columns(output, results[output.kind])
        batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(output_fields(output)))
        for fault, bad in bad_column(output, batch, alone=len(outputs) == 1).items():
            if bad.any():
                raise ModelError(f"text {int(bad.argmax())}: {CODES[fault]}: as {output}: {WORDS[fault]}")
        size += batch.nbytes
        if size > MOST_REPLY_BYTES:
            raise ModelError(
                f"the answer has more than {MOST_REPLY_BYTES:,} bytes: ask for fewer texts, or submit a job"
            )
        rows = tuple(to_fields(columns[0]))
        made.append(ReplyOutput(name=output.name, kind=output.kind, dtype=output.dtype, dim=output.dim, rows=rows))
    return tuple(made)
