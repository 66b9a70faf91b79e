"""Interactive requests: a few texts now, while jobs of the same queue run."""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from embedstream.chunks import Token
from embedstream.errors import RequestError, UsageError
from embedstream.jobs import check_prompting, check_setting
from embedstream.outputs import Dtype, Kind, OutputSpec, check_outputs, parse_emit
from embedstream.queue.broker import AsyncBroker, Broker
from embedstream.queue.steps import Answer, Code, Step, Steps
from embedstream.server.patience import NotYet, Patience
from embedstream.settings import BLOCK_LIMITS, MIB

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MOST_TEXTS = 1024
"""A request is for a few texts; more are a job."""

MOST_BODY_BYTES = 4 * MIB
"""Of a request as it travels, looked at before it is decoded."""

MOST_INPUT_BYTES = 8 * MIB
"""Of what enters the model: each text with the prompt in front of it."""

MOST_TOKENIZED_BYTES = 256 * 1024
"""Of texts whose tokens are asked for: an answer has some fifty bytes for each of these."""

MOST_WAITING = 1000
"""Requests that may wait on a queue's stream before it is called busy."""

SLICE_SECONDS = 2.0
"""One blocking read of the answer, far below the connection's timeout."""

BUSY_SECONDS = 0.1


RequestTask = Literal["embed", "rerank", "classify", "tokenize"]

KIND_OF: dict[RequestTask, Kind] = {"embed": "dense", "rerank": "score", "classify": "labels"}
"""What a model's answer to a request is. Tokens are none of its results."""


EMBEDDED: tuple[Kind, ...] = ("dense", "sparse", "multivector")
"""Kinds of outputs that are asked for by name."""

MOST_REPLY_BYTES = 64 * MIB
"""Of outputs by name: a vector for each token makes long answers."""


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts for the model, as one entry of the queue's interactive stream (MessagePack)."""

    texts: tuple[str, ...]
    role: Literal["document", "query"] = "query"
    prompt: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    """Tokens, special tokens included; None: the model's own."""
    task: RequestTask = "embed"
    query: str | None = None
    """To rerank: the first text of each pair."""
    id: str = ""
    """By which its sender knows it, for a worker's log."""
    trace: str = ""
    """`Step.trace` of the program that asks."""
    outputs: tuple[OutputSpec, ...] = ()
    """To embed: what is wanted of each text; empty: vectors in float32."""
    add_special_tokens: bool = True
    """To tokenize: whether those that the model wants around a text are added."""

    def check(self) -> None:
        """Raise `UsageError` for more than a request may ask."""
        if len(self.texts) > MOST_TEXTS:
            raise UsageError(f"{len(self.texts)} texts in one request: at most {MOST_TEXTS}, submit more as a job")
        check_setting("the request's id", self.id)
        check_setting("the request's trace", self.trace)
        check_prompting(self.prompt, self.prompt_name, self.max_length)
        if (self.task == "rerank") != bool(self.query):
            raise UsageError(
                f"{self.task}() with query {self.query!r}: rerank() needs one that is not empty, others none"
            )
        check_outputs(self.outputs, frozenset())
        for output in self.outputs:
            check_setting("outputs", output.name)
            if self.task != "embed" or output.kind not in EMBEDDED:
                raise UsageError(f"{self.task}() with output {output}: only embed() gives {', '.join(EMBEDDED)}")
            if output.dtype == "int8":
                raise UsageError(f"embed() with output {output}: int8 has the ranges of a whole job: take float32")
        before = (self.prompt or "") + (self.query or "")
        total, most = len(self.texts) * len(before.encode()), BLOCK_LIMITS.longest_text_bytes
        named = [("the query", self.query or ""), *((f"text {at}", text) for at, text in enumerate(self.texts))]
        for name, text in named:
            size = len(text.encode())
            if size > most:
                raise UsageError(f"{name} has {size:,} bytes: at most {most:,} are allowed, split it")
            total += size
        if total > MOST_INPUT_BYTES:
            raise UsageError(
                f"the texts have {total:,} bytes, each with its {'query' if self.query else 'prompt'}: at most "
                f"{MOST_INPUT_BYTES:,} are allowed in one request, submit more as a job"
            )
        if self.task == "tokenize" and total > MOST_TOKENIZED_BYTES:
            raise UsageError(f"{total:,} bytes to tokenize: at most {MOST_TOKENIZED_BYTES:,} are allowed, send fewer")


def make_request(
    texts: Sequence[str] | str,
    role: Literal["document", "query"],
    prompt: str | None,
    prompt_name: str | None,
    max_length: int | None,
    task: RequestTask = "embed",
    outputs: Sequence[OutputSpec | str] | None = None,
) -> EmbedRequest:
    """A request. Raises `UsageError` for what are no texts, or no outputs."""
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    for at, text in enumerate(texts):
        _check_text(task, f"text {at}", text)
    if outputs is not None and not outputs:
        raise UsageError(f"{task}() without any output: leave outputs out, or name one of {', '.join(EMBEDDED)}")
    return EmbedRequest(
        texts=texts,
        role=role,
        prompt=prompt,
        prompt_name=prompt_name,
        max_length=max_length,
        task=task,
        outputs=tuple(parse_emit(each) if isinstance(each, str) else each for each in outputs or ()),
    )


def make_pairs(query: str, texts: Sequence[str], max_length: int | None) -> EmbedRequest:
    """A request for scores. Raises `UsageError` for what are no texts."""
    _check_text("rerank", "the query", query)
    request = make_request(texts, "document", None, None, max_length, "rerank")
    return msgspec.structs.replace(request, query=query)


def _check_text(task: RequestTask, name: str, text: str) -> None:
    """Raise `UsageError` for what is no text."""
    if not isinstance(text, str):
        raise UsageError(f"{task}() takes strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} has half of a UTF-16 surrogate pair (character {error.start}); repair it") from error


class ReplyOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One of the outputs that were asked for."""

    name: str
    kind: Kind
    dtype: Dtype
    dim: int
    rows: tuple[bytes, ...]
    """Of each text, as a Redis hash has it."""


class EmbedReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: numbers for each text, or why there are none."""

    kind: Kind = "dense"
    """dense: vectors; score: one number for each pair; labels: the scores of all labels."""
    dim: int = 0
    vectors: bytes = b""
    """float32 little-endian, [texts, dim]."""
    labels: tuple[str, ...] = ()
    """Names of the labels, [dim]."""
    tokens: int = 0
    truncated: int = 0
    counts: bytes = b""
    """Tokens of each text, special tokens and prompt included: uint32 little-endian, [texts]."""
    cut: tuple[int, ...] = ()
    """The texts that were longer than the model takes, by their places."""
    outputs: tuple[ReplyOutput, ...] = ()
    """As many as were asked for by name; then there are no `vectors`."""
    tokenized: tuple[tuple[Token, ...], ...] = ()
    """Of each text, where its tokens were asked for, prompt included; then there are no other results."""
    model: str = ""
    fingerprint: str = ""
    error: str = ""
    internal: bool = False
    """Whether the error is none of the request's own, so that it may be sent again."""


class Asking:
    """One request on its way: what is sent, what is received, and until when (`time.monotonic`)."""

    def __init__(self, steps: Steps, request: EmbedRequest, seconds: float) -> None:
        """Raises `UsageError` for more than a request may ask."""
        request.check()
        self._payload = msgspec.msgpack.encode(request)
        refuse_long_body(self._payload)
        self._steps = steps
        self._name = secrets.token_hex(8)
        self.reply_key = steps.keys.reply(self._name)
        self.end = time.monotonic() + seconds

    def step(self) -> Step[Answer]:
        """Puts it on the queue's stream; again is harmless."""
        left_ms = int(1000 * (self.end - time.monotonic()))
        return self._steps.request(self._name, self._payload, max(1, left_ms), MOST_WAITING)

    def sent(self, answer: Answer) -> None:
        """Raises `NotYet` if the queue is busy."""
        if answer.code is not Code.OK:
            raise NotYet("the queue is busy", BUSY_SECONDS)

    def slice_seconds(self) -> float:
        """For one blocking read of the reply. Never 0, for which Redis would wait forever."""
        return min(SLICE_SECONDS, max(0.01, self.end - time.monotonic()))

    def received(self, raw: bytes | None) -> EmbedReply:
        """The reply. Raises `NotYet` if none came, `RequestError` if it is not one."""
        if raw is None:
            raise NotYet("no worker has answered", 0)
        try:
            return msgspec.msgpack.decode(raw, type=EmbedReply)
        except Exception as error:  # whatever decoding raises
            raise RequestError(f"the worker's answer cannot be read ({error}): upgrade the older side") from error


def ask(broker: Broker, request: EmbedRequest, seconds: float) -> EmbedReply | None:
    """The reply to a request; None if none came within `seconds`.

    Raises:
        UsageError: more than a request may ask.
        RequestError: the reply is not one.
        redis.RedisError: Redis could not be used in this time, or refuses.
    """
    asking = Asking(broker, request, seconds)
    patience = Patience(until=asking.end)
    try:
        patience(lambda: asking.sent(broker.run(asking.step())))
        return patience(lambda: asking.received(broker.receive(asking.reply_key, asking.slice_seconds())))
    except NotYet:
        return None


async def ask_on_loop(broker: AsyncBroker, request: EmbedRequest, seconds: float) -> EmbedReply | None:
    """As `ask`."""
    asking = Asking(broker, request, seconds)
    patience = Patience(until=asking.end)

    async def send() -> None:
        asking.sent(await broker.run(asking.step()))

    async def receive() -> EmbedReply:
        return asking.received(await broker.receive(asking.reply_key, asking.slice_seconds()))

    try:
        await patience.hold(send)
        return await patience.hold(receive)
    except NotYet:
        return None


def refuse_long_body(body: bytes) -> None:
    """Raise `UsageError` for a request of more bytes than are decoded."""
    if len(body) > MOST_BODY_BYTES:
        raise UsageError(
            f"a request of {len(body):,} bytes: at most {MOST_BODY_BYTES:,} are allowed, submit more texts as a job"
        )


def vectors(reply: EmbedReply, texts: int) -> npt.NDArray[np.float32]:
    """The reply's vectors, float32 [texts, dim].

    Raises:
        RequestError: the worker could not embed the texts, or its answer has another size.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise UsageError("embed() returns a NumPy array: pip install numpy") from error
    _check(reply, texts, "dense")
    return np.frombuffer(reply.vectors, dtype="<f4").reshape(texts, reply.dim).astype(np.float32)


def scores(reply: EmbedReply, pairs: int) -> list[float]:
    """The reply's score of each pair. Raises as `vectors`."""
    _check(reply, pairs, "score", 1)
    return list(struct.unpack(f"<{pairs}f", reply.vectors))


def labels(reply: EmbedReply, texts: int) -> list[tuple[str, float]]:
    """The reply's best label of each text, and its score. Raises as `vectors`."""
    _check(reply, texts, "labels", len(reply.labels))
    rows = struct.iter_unpack(f"<{reply.dim}f", reply.vectors)
    return [max(zip(reply.labels, row, strict=True), key=lambda each: each[1]) for row in rows]


def _check(reply: EmbedReply, texts: int, kind: Kind, dim: int | None = None) -> None:
    """Raise `RequestError` for a reply that is not what was asked for."""
    if reply.error:
        raise RequestError(reply.error)
    if reply.kind != kind:
        raise RequestError(f"the worker answered with {reply.kind}, not {kind}: upgrade it")
    if reply.dim < 1 or (dim is not None and reply.dim != dim) or len(reply.vectors) != 4 * texts * reply.dim:
        raise RequestError(f"the worker answered {len(reply.vectors)} bytes for {texts} vectors of {reply.dim}")
