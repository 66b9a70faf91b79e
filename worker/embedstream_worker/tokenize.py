"""Stage 2: texts to token ids, a window at a time, its blocks in several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import pyarrow as pa

from embedstream.dataset.input_hash import entered, firsts, input_hashes, model_inputs, strings_of
from embedstream.queue.refusals import Code
from embedstream_worker.ahead import Ahead
from embedstream_worker.batching import join_tokens
from embedstream_worker.engines.base import TextTokenizer, Tokens
from embedstream_worker.held import HeldBlock, RowErrors, TokenizedGroup, Window, release
from embedstream_worker.infer import Urgent
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel
from embedstream_worker.shared import RETRIES, Shared
from embedstream_worker.suspects import BY_CHUNK, NotOurs, Trial
from embedstream_worker.tokenizing import NO_TOKENS, encode_each

_NONE = Tokens(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.bool_))

Encoded = tuple[Tokens, RowErrors]
"""Tokens of some texts, and those of them that have none."""


class Tokenize:
    """Owns its tokenizers, one for each thread: they are not safe to share."""

    def __init__(
        self,
        shared: Shared,
        make_tokenizer: Callable[[], TextTokenizer],
        threads: int,
        ahead: Ahead,
        source: Channel[Window],
        out: Channel[list[TokenizedGroup] | Urgent],
    ) -> None:
        self._broker = shared.broker(RETRIES)
        self._consumer, self._held, self._meter = shared.consumer, shared.held, shared.meter
        self._life, self._activity = shared.life, shared.activity
        self._threads = threads
        self._tokenizers: SimpleQueue[TextTokenizer] = SimpleQueue()
        for _ in range(threads):
            self._tokenizers.put(make_tokenizer())
        self._ahead = ahead
        self._source = source
        self._out = out

    def run(self) -> None:
        """Until the source closes. A worker that stops hands untouched windows back."""
        with ThreadPoolExecutor(self._threads, "tokenize") as pool:
            while True:
                window = self._source.get()
                assert window is not None
                if self._life.stopping.is_set():
                    release(self._broker, self._consumer, self._held, window.blocks)
                    continue
                try:
                    with self._meter.stage("tokenize"):
                        groups = [self._group(pool, job, blocks) for job, blocks in by_job(window.blocks)]
                except NotOurs:
                    self._ahead.arrived(sum(held.tokens for held in window.blocks))
                    release(self._broker, self._consumer, self._held, window.blocks)
                    continue
                self._out.put(groups)
                self._activity.progress()

    def _group(self, pool: ThreadPoolExecutor, job: OpenJob, blocks: list[HeldBlock]) -> TokenizedGroup:
        if len(blocks) == 1 and blocks[0].deliveries >= BY_CHUNK:
            return self._tried(job, blocks[0])
        pieces = list(pool.map(lambda held: self._encode(job, held), blocks))
        tokens, errors = _joined([piece for piece, _ in pieces])
        return TokenizedGroup(job, blocks, tokens, pa.concat_arrays([hashes for _, hashes in pieces]), errors)

    def _encode(self, job: OpenJob, held: HeldBlock) -> tuple[Encoded, pa.FixedSizeBinaryArray]:
        rows, query = held.block.rows, job.spec.query_field
        tokenizer = self._tokenizers.get()
        try:
            with self._activity.computing():
                if query is not None:
                    encoded = encode_pairs(tokenizer, firsts(rows, query), strings_of(rows.column("text")), job)
                else:
                    encoded = encode_rows(tokenizer, strings_of(rows.column("text")), job.prompt, job.max_length)
        finally:
            self._tokenizers.put(tokenizer)
        return encoded, input_hashes(entered(rows, query), job.prompt)

    def _tried(self, job: OpenJob, held: HeldBlock) -> TokenizedGroup:
        """A block with which workers died, row by row. Raises `NotOurs`."""
        trial = Trial(self._broker, self._held, self._life, held)
        rows, query = held.block.rows, job.spec.query_field
        texts = strings_of(rows.column("text"))
        ahead = None if query is None else firsts(rows, query)
        tokenizer, errors, pieces = self._tokenizers.get(), trial.errors, [_NONE]
        try:
            for row, text in enumerate(texts):
                if row in errors:
                    pieces.append(NO_TOKENS)
                    continue
                trial.note(row)
                with self._activity.computing():
                    if ahead is not None:
                        tokens, failed = encode_pairs(tokenizer, [ahead[row]], [text], job)
                    else:
                        tokens, failed = encode_rows(tokenizer, [text], job.prompt, job.max_length)
                pieces.append(tokens)
                if failed:
                    errors[row] = failed[0]
            trial.note(None)
        finally:
            self._tokenizers.put(tokenizer)
        hashes = input_hashes(entered(rows, query), job.prompt)
        return TokenizedGroup(job, [held], join_tokens(pieces), hashes, errors, trial.note)


def by_job(blocks: list[HeldBlock]) -> list[tuple[OpenJob, list[HeldBlock]]]:
    """A window's blocks by job, jobs in order of first appearance."""
    groups: dict[int, tuple[OpenJob, list[HeldBlock]]] = {}
    for held in blocks:
        groups.setdefault(id(held.job), (held.job, []))[1].append(held)
    return list(groups.values())


def encode_rows(tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, max_length: int) -> Encoded:
    """Token ids of each text with the prompt in front; a text that the tokenizer cannot bear has none, and an error.

    Raises:
        Exception: what the tokenizer raises for any text at all.
    """
    return _joined([encode_each(tokenizer, inputs, max_length) for inputs in model_inputs(texts, prompt)])


def encode_pairs(tokenizer: TextTokenizer, firsts: Sequence[str | None], texts: Sequence[str], job: OpenJob) -> Encoded:
    """Token ids of pairs; one without its first half has none, and an error. Raises as `encode_rows`."""
    lacking = [row for row, first in enumerate(firsts) if not first]
    tokens, errors = encode_each(tokenizer, texts, job.max_length, [first or "" for first in firsts])
    message = f'the row has no "{job.spec.query_field}", the first of its pair'
    return tokens, errors | dict.fromkeys(lacking, (Code.MISSING_QUERY.value, message))


def _joined(pieces: Sequence[Encoded]) -> Encoded:
    errors, first = RowErrors(), 0
    for tokens, failed in pieces:
        errors |= {first + row: error for row, error in failed.items()}
        first += len(tokens.truncated)
    return join_tokens([tokens for tokens, _ in pieces]), errors
