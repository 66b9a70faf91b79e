"""Stage 2: texts to token ids, a window at a time, its blocks in several threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.input_hash import entered, firsts, input_hashes, model_inputs, strings_of
from embedstream.queue.refusals import Code
from embedstream_worker.ahead import Ahead
from embedstream_worker.batching import gather_batch, join_tokens
from embedstream_worker.engines.base import TextTokenizer, Tokens
from embedstream_worker.equal_texts import distinct, of_all_rows
from embedstream_worker.held import HeldBlock, RowErrors, TokenizedGroup, Window, release
from embedstream_worker.infer import Urgent
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel
from embedstream_worker.quick_tokenizing import QuickTokenizer, quick_tokenizer, same_tokens
from embedstream_worker.shared import RETRIES, Shared
from embedstream_worker.suspects import BY_CHUNK, NotOurs, Trial
from embedstream_worker.tokenizing import NO_TOKENS, FastTokenizer, encode_each

log = logging.getLogger(__name__)

_SAMPLED = 16
"""Rows of each window and job that are split by the usual tokenizer, too, where a quick one is used."""

_NONE = Tokens(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.bool_))

Encoded = tuple[Tokens, RowErrors]
"""Tokens of some texts, and those of them that have none."""


class _Piece(NamedTuple):
    """A block's tokens, its `input_hash`es, and its `TokenizedGroup.known`."""

    encoded: Encoded
    hashes: pa.FixedSizeBinaryArray
    known: npt.NDArray[np.int64] | None


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
        self._make_tokenizer = make_tokenizer
        self._usual = make_tokenizer()
        self._quick = quick_tokenizer(self._usual) is not None
        self._tokenizers = self._make_tokenizers()
        self._windows = 0
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
                        groups = self._checked(pool, groups)
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
        tokens, errors = _joined([piece.encoded for piece in pieces])
        errors |= too_long(job, tokens, errors)
        hashes = pa.concat_arrays([piece.hashes for piece in pieces])
        known = [piece.known for piece in pieces if piece.known is not None]
        return TokenizedGroup(job, blocks, tokens, hashes, errors, known=np.concatenate(known) if known else None)

    def _checked(self, pool: ThreadPoolExecutor, groups: list[TokenizedGroup]) -> list[TokenizedGroup]:
        """A window's groups, from the usual tokenizer from now on if the quick one splits a text otherwise."""
        self._windows += 1
        if not self._quick or all(self._agrees(group) for group in groups):
            return groups
        log.warning(
            "the package nanotoken splits a text otherwise than the model's own tokenizer: this window's texts are "
            "split again, and it is not used any more"
        )
        self._quick = False
        self._tokenizers = self._make_tokenizers()
        return [group if group.note else self._group(pool, group.job, group.blocks) for group in groups]

    def _agrees(self, group: TokenizedGroup) -> bool:
        """Whether some rows of a group, others each time, have the tokens that the usual tokenizer gives."""
        job, new = group.job, np.flatnonzero(group.new)
        every = max(1, len(new) // _SAMPLED)
        sampled = new[self._windows % every :: every]
        if group.note or job.spec.query_field is not None or not len(sampled):
            return True
        column = pa.chunked_array([held.block.rows.column("text") for held in group.blocks])
        texts = cast("list[str]", column.take(pa.array(sampled, pa.int64())).to_pylist())
        with self._activity.computing():
            tokens, _ = encode_rows(self._usual, texts, job.prompt, job.max_length)
        picked = gather_batch(group.tokens, sampled, 0, job.spec.role)
        return same_tokens(Tokens(picked.ids, picked.offsets, group.tokens.truncated[sampled]), tokens)

    def _make_tokenizers(self) -> SimpleQueue[TextTokenizer]:
        tokenizers: SimpleQueue[TextTokenizer] = SimpleQueue()
        for _ in range(self._threads):
            usual = self._make_tokenizer()
            tokenizers.put(QuickTokenizer(usual) if self._quick and isinstance(usual, FastTokenizer) else usual)
        return tokenizers

    def _encode(self, job: OpenJob, held: HeldBlock) -> _Piece:
        rows, query = held.block.rows, job.spec.query_field
        hashes = input_hashes(entered(rows, query), job.prompt)
        known = None if job.known is None else job.known.find(hashes)
        first, text = distinct(hashes)
        new = np.ones(len(first), np.bool_) if known is None else known[first] < 0
        all_of_them = len(first) == rows.num_rows and bool(new.all())
        if not all_of_them:
            firsts_of_texts: Any = pa.array(first[new])
            rows = rows.take(firsts_of_texts)
        tokenizer = self._tokenizers.get()
        try:
            with self._activity.computing():
                if query is not None:
                    tokens, errors = encode_pairs(tokenizer, firsts(rows, query), strings_of(rows.column("text")), job)
                else:
                    tokens, errors = encode_rows(tokenizer, strings_of(rows.column("text")), job.prompt, job.max_length)
        finally:
            self._tokenizers.put(tokenizer)
        if not all_of_them:
            at = np.where(new, np.cumsum(new) - 1, int(new.sum()))[text]  # behind the others: no tokens
            tokens, errors = join_tokens([tokens, NO_TOKENS]).take(at), of_all_rows(errors, at)
        return _Piece((tokens, errors), hashes, known)

    def _tried(self, job: OpenJob, held: HeldBlock) -> TokenizedGroup:
        """A block with which workers died, row by row, by the usual tokenizer: perhaps they died of a quick one.

        Raises `NotOurs`.
        """
        trial = Trial(self._broker, self._held, self._life, held)
        rows, query = held.block.rows, job.spec.query_field
        texts = strings_of(rows.column("text"))
        ahead = None if query is None else firsts(rows, query)
        hashes = input_hashes(entered(rows, query), job.prompt)
        known = None if job.known is None else job.known.find(hashes)
        errors, pieces = trial.errors, [_NONE]
        for row, text in enumerate(texts):
            if row in errors or (known is not None and known[row] >= 0):
                pieces.append(NO_TOKENS)
                continue
            trial.note(row)
            with self._activity.computing():
                if ahead is not None:
                    tokens, failed = encode_pairs(self._usual, [ahead[row]], [text], job)
                else:
                    tokens, failed = encode_rows(self._usual, [text], job.prompt, job.max_length)
            pieces.append(tokens)
            if failed:
                errors[row] = failed[0]
        trial.note(None)
        tokens = join_tokens(pieces)
        errors |= too_long(job, tokens, errors)
        return TokenizedGroup(job, [held], tokens, hashes, errors, trial.note, known)


def by_job(blocks: list[HeldBlock]) -> list[tuple[OpenJob, list[HeldBlock]]]:
    """A window's blocks by job, jobs in order of first appearance."""
    groups: dict[int, tuple[OpenJob, list[HeldBlock]]] = {}
    for held in blocks:
        groups.setdefault(id(held.job), (held.job, []))[1].append(held)
    return list(groups.values())


def too_long(job: OpenJob, tokens: Tokens, errors: RowErrors) -> RowErrors:
    """Errors of rows that the job does not want to be cut."""
    if job.spec.on_long == "cut" and job.spec.chunking is None:
        return {}
    message = f"the text has more than {job.max_length:,} tokens, and nothing is cut (--on-long error)"
    return {row: ("too_long", message) for row in np.flatnonzero(tokens.truncated).tolist() if row not in errors}


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
