"""Deterministic vectors from a text's bytes alone: for tests, and for measuring everything but the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.chunks import Token
from embedstream.errors import ModelError
from embedstream_worker.engines.base import EngineInfo, Origin, OutputInfo, Results, Role, TokenBatch, Tokens

MAX_LENGTH = 8192
_FORMULA = 1  # part of the fingerprint: to be raised when the formula changes

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_CHUNK_TOKENS = 32_768  # work arrays that stay in the processor's cache
_CHUNK_ROWS = 256
_LAST_WORD_MASKS = np.array([0xFFFFFFFF, 0xFF, 0xFFFF, 0xFFFFFF], np.uint32)  # by byte length modulo 4

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


def _begins(text: str) -> npt.NDArray[np.int64]:
    sizes = np.array([len(character.encode()) for character in text], np.int64)
    return np.searchsorted(np.cumsum(sizes), np.arange(0, int(sizes.sum()), 4), "right").astype(np.int64)


def _spelled(content: bytes) -> tuple[Token, ...]:
    pieces = [(start, content[start : start + 4]) for start in range(0, max(1, len(content)), 4)]
    return tuple(
        Token(int.from_bytes(piece, "little"), piece.decode("utf-8", "replace"), start, start + len(piece))
        for start, piece in pieces
    )


class HashingTokenizer:
    """A token is 4 UTF-8 bytes of the text, little-endian, the last one filled up with zeros."""

    def begins(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Where the tokens of each text begin in it, in characters."""
        return [_begins(text) for text in texts]

    def spelled(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[Token, ...]]:  # noqa: ARG002
        """All tokens of each text; it has no special ones."""
        return [_spelled(text.encode()) for text in texts]

    def as_json(self) -> str:
        """What it is, as other tokenizers say it."""
        return '{"type": "hashing"}'

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        """Token ids, cut at `max_length`; the empty text is the single token 0. It takes no pairs."""
        assert firsts is None
        strings = pa.array(texts, pa.large_string())
        _, starts_buffer, bytes_buffer = strings.buffers()
        count = len(texts)
        if count == 0 or starts_buffer is None:
            return Tokens(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.bool_))
        starts = np.frombuffer(memoryview(starts_buffer), np.int64, count + 1)
        total = int(starts[-1])
        content = np.zeros(total + 4, np.uint8)  # four more, so that a word can be read even at the end
        if bytes_buffer is not None and total:
            content[:total] = np.frombuffer(memoryview(bytes_buffer), np.uint8, total)
        sizes = np.diff(starts)
        words = np.maximum((sizes + 3) // 4, 1)
        kept = np.minimum(words, max_length)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        at_byte = np.ndarray((total + 1,), "<u4", content.data, strides=(1,))
        ids = at_byte[np.arange(offsets[-1]) * 4 + np.repeat(starts[:-1] - offsets[:-1] * 4, kept)]
        # The last word of a whole text has read on into the next text.
        last = np.where(sizes == 0, np.uint32(0), _LAST_WORD_MASKS[sizes % 4])
        whole = kept == words
        ids[offsets[1:][whole] - 1] &= last[whole]
        return Tokens(ids.astype(np.uint32, copy=False).view(np.int32), offsets, ~whole)

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """Tokens that hold nothing but prompt."""
        return min(len(prompt.encode()) // 4, max_length)


class HashingEngine:
    """Vectors that anyone can recompute from a text. Close texts have unrelated vectors: it measures, it finds nothing.

    The formula, with all integers unsigned and wrapping at their width; `mix64` and `mix32` below:

        t[j]   = the j-th 4 UTF-8 bytes of the text, little-endian, filled up with zeros; [0] for an empty text;
                 of a long text only the first max_length                                          (32 bits, j = 0..n-1)
        s      = sum over j of mix64(t[j] + (j + 1) * 0x9E3779B97F4A7C15)                          (64 bits)
        h      = mix64(s + n)                                                                      (64 bits)
        u[k]   = mix32(low32(h) + (high32(h) | 1) * (k + 1))                                     (32 bits, k = 0..dim-1)
        v[k]   = signed(u[k]) / 2**31, then divided by the Euclidean norm of v                     (float32)

        mix64(x): x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
        mix32(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16

    (mix64 is SplitMix64's finalizer, mix32 the lowbias32 of Christopher Wellons.)
    """

    in_flight = 1

    def __init__(self, dim: int = 384) -> None:
        """Raises `ModelError` on a machine whose words are big-endian."""
        if sys.byteorder != "little":
            raise ModelError("the hashing engine reads words in place and needs a little-endian machine")
        self._info = EngineInfo(
            engine="hashing",
            device="cpu",
            dtype="float32",
            fingerprint=f"hashing-{_FORMULA}-{dim}",
            max_length=MAX_LENGTH,
            padded=False,
            batch_tokens=65_536,  # hundreds of rows: the cost of a call vanishes
            origin=Origin(source="built in"),
            outputs={"dense": OutputInfo(dim=dim, normalized=True)},
        )
        self._steps = np.arange(1, dim + 1, dtype=np.uint32)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def warm_up(self, batch_tokens: int) -> None:  # noqa: ARG002 - as the protocol has it
        tokens = self.tokenizer().encode(["warm"], MAX_LENGTH)
        self.run(TokenBatch(tokens.ids, tokens.offsets, 1, 0, "document"))

    def tokenizer(self) -> HashingTokenizer:
        return HashingTokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:  # noqa: ARG002
        if prompt is None and prompt_name is not None:
            raise ModelError(f"--prompt-name {prompt_name}: the hashing engine has no prompts; use --prompt TEXT")
        return prompt or ""

    def run(self, batch: TokenBatch) -> Results:
        hashes = _text_hashes(batch)
        vectors = np.empty((len(batch), len(self._steps)), np.float32)
        for start in range(0, len(batch), _CHUNK_ROWS):
            vectors[start : start + _CHUNK_ROWS] = self._vectors(hashes[start : start + _CHUNK_ROWS])
        return {"dense": vectors}

    def run_exact(self, batch: TokenBatch) -> Results:
        return self.run(batch)

    def close(self) -> None:
        pass

    def _vectors(self, hashes: U64) -> npt.NDArray[np.float32]:
        low = hashes.astype(np.uint32)
        high = (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        mixed = high[:, None] * self._steps
        mixed += low[:, None]
        _mix32(mixed)
        vectors = mixed.view(np.int32).astype(np.float32)
        vectors *= np.float32(2.0**-31)
        vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        return vectors


def _text_hashes(batch: TokenBatch) -> U64:
    """`h` of the formula for each text, [n]."""
    lengths, offsets = batch.lengths, batch.offsets
    sums = np.empty(len(batch), np.uint64)
    start = 0
    while start < len(batch):
        stop = int(np.searchsorted(offsets, offsets[start] + _CHUNK_TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), len(batch))
        first, last = int(offsets[start]), int(offsets[stop])
        place = np.arange(first + 1, last + 1, dtype=np.int64)
        place -= np.repeat(offsets[start:stop], lengths[start:stop])
        mixed = place.view(np.uint64)
        mixed *= _GOLDEN
        mixed += batch.ids[first:last].view(np.uint32)
        _mix64(mixed)
        sums[start:stop] = np.add.reduceat(mixed, offsets[start:stop] - first)
        start = stop
    sums += lengths.astype(np.uint64)
    _mix64(sums)
    return sums


def _mix64(x: U64) -> None:
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)


def _mix32(x: U32) -> None:
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
