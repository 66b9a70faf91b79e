"""Stage 2: texts to token ids, a window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedstream.broker import Broker
from embedstream_worker.batching import join_tokens
from embedstream_worker.engines.base import TextTokenizer, Tokens
from embedstream_worker.held import Held, HeldBlock, RowErrors, TokenizedGroup, Window, release
from embedstream_worker.infer import Urgent
from embedstream_worker.inputs import input_hashes, model_inputs
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel, Life

_NO_TOKENS = Tokens(np.empty(0, np.int32), np.zeros(2, np.int64), np.zeros(1, np.bool_))


class Tokenize:
    """Owns its tokenizer: one is not safe to share."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        broker: Broker,
        consumer: str,
        held: Held,
        life: Life,
        source: Channel[Window],
        out: Channel[list[TokenizedGroup] | Urgent],
    ) -> None:
        self._tokenizer = tokenizer
        self._broker = broker
        self._consumer = consumer
        self._held = held
        self._life = life
        self._source = source
        self._out = out

    def run(self) -> None:
        """Until the source closes. A worker that stops hands untouched windows back."""
        while True:
            window = self._source.get()
            assert window is not None
            if self._life.stopping.is_set():
                release(self._broker, self._consumer, self._held, window.blocks)
                continue
            self._out.put([self._group(job, blocks) for job, blocks in by_job(window.blocks)])
            self._life.progress()

    def _group(self, job: OpenJob, blocks: list[HeldBlock]) -> TokenizedGroup:
        column: Any = pa.chunked_array([held.block.rows.column("text") for held in blocks])
        inputs = model_inputs(column, job.prompt)
        tokens, errors = encode_rows(self._tokenizer, inputs, job.max_length)
        return TokenizedGroup(job, blocks, tokens, input_hashes(inputs), errors)


def by_job(blocks: list[HeldBlock]) -> list[tuple[OpenJob, list[HeldBlock]]]:
    """A window's blocks by job, jobs in order of first appearance."""
    groups: dict[int, tuple[OpenJob, list[HeldBlock]]] = {}
    for held in blocks:
        groups.setdefault(id(held.job), (held.job, []))[1].append(held)
    return list(groups.values())


def encode_rows(tokenizer: TextTokenizer, inputs: Sequence[str], max_length: int) -> tuple[Tokens, RowErrors]:
    """Token ids of each input; a text that the tokenizer cannot bear has none, and an error.

    Raises:
        Exception: what the tokenizer raises for any text at all.
    """
    try:
        return tokenizer.encode(inputs, max_length), {}
    except Exception:  # noqa: BLE001 - whatever it raises, it is the fault of some text, or of the tokenizer
        tokenizer.encode(["a"], max_length)
    pieces, errors = [], RowErrors()
    for row, text in enumerate(inputs):
        try:
            pieces.append(tokenizer.encode([text], max_length))
        except Exception as error:  # noqa: BLE001
            pieces.append(_NO_TOKENS)
            errors[row] = ("tokenizer_error", f"{type(error).__name__}: {error}")
    return join_tokens(pieces), errors
