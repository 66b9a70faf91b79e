"""From texts to token ids, as sentence-transformers' Transformer module would make them, but flat and flagged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from embedstream.chunks import Token
from embedstream.errors import ModelError
from embedstream_worker.batching import join_tokens
from embedstream_worker.engines.base import HARMLESS, TextTokenizer, Tokens
from embedstream_worker.inputs import cut_characters
from embedstream_worker.panics import panics_are_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 20
"""Max length of a model without one: no text within a block's bounds has more tokens."""

_CHARACTERS_PER_TOKEN = 8  # English has 4 to 5: a text cut there still overflows its limit
_CHARACTERS_MORE = 512
_ENOUGH_OVERFLOW = 32  # tokens past the limit that show that the cut did not touch those before it


NO_TOKENS = Tokens(np.empty(0, np.int32), np.zeros(2, np.int64), np.zeros(1, np.bool_))
"""Those of one text that has none."""


@dataclass(frozen=True)
class Limits:
    """How many tokens a text may have, special tokens included."""

    longest: int
    """The model's positions: no job may ask for more."""
    shortest: int
    """The special tokens and one more."""

    def check(self, max_length: int) -> None:
        """Raise `ModelError` for a max length that the model cannot serve."""
        if max_length > self.longest:
            raise ModelError(f"max length {max_length}: the model has {self.longest} positions; use that or less")
        if max_length < self.shortest:
            raise ModelError(
                f"max length {max_length}: leaves no room beside the model's {self.shortest - 1} special tokens; "
                f"use at least {self.shortest}"
            )


class FastTokenizer:
    """Around a tokenizer of the tokenizers library. Each instance is a copy: they cannot be shared by threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        limits: Limits,
        special_ids: frozenset[int] = frozenset(),
        truncation_side: str = "right",
        add_special_tokens: bool = True,
    ) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = backend.encode_special_tokens
        self._backend.no_padding()
        self.limits = limits
        self._special_ids = special_ids
        self.truncation_side = truncation_side
        self.add_special_tokens = add_special_tokens
        self._max_length: int | None = None
        self._whole: tokenizers.Tokenizer | None = None

    def as_json(self) -> str:
        """The tokenizer as `tokenizer.json` has it, without padding and truncation."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.no_truncation()
        described: str = backend.to_str()
        return described

    def begins(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Where the tokens of each text begin in it, in characters, special tokens left out."""
        encodings = self._uncut(texts, add_special_tokens=False)
        firsts = (np.array([first for first, _ in encoding.offsets], np.int64) for encoding in encodings)
        return [np.maximum.accumulate(first) for first in firsts]

    def spelled(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[Token, ...]]:
        """All tokens of each text, however many. A model that wants no special tokens is given none."""
        encodings = self._uncut(texts, add_special_tokens=add_special_tokens and self.add_special_tokens)
        return [_spelled(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        """Token ids with special tokens, cut at `max_length` tokens. Raises `ModelError` for an impossible length."""
        self._set_max_length(max_length)
        from_end, most = self.truncation_side == "left", characters_for(max_length)
        inputs, cut = cut_characters(texts, most, from_end)
        if firsts is None:
            encodings = self._encode(inputs)
        else:
            short, longer = cut_characters(firsts, most, from_end)
            encodings = self._encode(list(zip(short, inputs, strict=True)))
            cut = sorted({*cut, *longer})
        doubtful = [row for row in cut if not overflows_enough(sum(map(len, encodings[row].overflowing)))]
        whole = [texts[row] if firsts is None else (firsts[row], texts[row]) for row in doubtful]
        for row, encoding in zip(doubtful, self._encode(whole), strict=True):
            encodings[row] = encoding
        types = None if firsts is None else [encoding.type_ids for encoding in encodings]
        tokens = _flatten([encoding.ids for encoding in encodings], types)
        for row in np.flatnonzero(tokens.lengths >= max_length).tolist():
            tokens.truncated[row] = bool(encodings[row].overflowing)
        return tokens

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """Leading tokens of a prompted text that belong to the prompt: all of the prompt's own but a last special."""
        if not prompt:
            return 0
        return _prompt_length(self.encode([prompt], max_length), self._special_ids)

    def _encode(self, texts: Sequence[str | tuple[str, str]]) -> list[tokenizers.Encoding]:
        with panics_are_errors():
            encodings: list[tokenizers.Encoding] = self._backend.encode_batch_fast(
                texts, add_special_tokens=self.add_special_tokens
            )
        return encodings

    def _uncut(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tokenizers.Encoding]:
        if self._whole is None:
            self._whole = tokenizers.Tokenizer.from_str(self.as_json())
            self._whole.encode_special_tokens = self._backend.encode_special_tokens
        with panics_are_errors():
            encodings: list[tokenizers.Encoding] = self._whole.encode_batch(
                list(texts), add_special_tokens=add_special_tokens
            )
        return encodings

    def _set_max_length(self, max_length: int) -> None:
        if max_length == self._max_length:
            return
        self.limits.check(max_length)
        self._backend.enable_truncation(max_length, direction=self.truncation_side)
        self._max_length = max_length


class PythonTokenizer:
    """Around one of the few tokenizers that are written in Python: right, but slow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._limits = limits

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        """Token ids with special tokens, cut at `max_length` tokens. Raises `ModelError` for an impossible length."""
        if firsts is not None:
            raise ModelError("the model's tokenizer is written in Python, which is too slow for pairs")
        self._limits.check(max_length)
        ids = self._encode(list(texts), truncation=False)
        longer = [row for row, row_ids in enumerate(ids) if len(row_ids) > max_length]
        shortened = self._encode([texts[row] for row in longer], truncation="longest_first", max_length=max_length)
        for row, row_ids in zip(longer, shortened, strict=True):
            ids[row] = row_ids
        tokens = _flatten(ids)
        tokens.truncated[longer] = True
        return tokens

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """Leading tokens of a prompted text that belong to the prompt: all of the prompt's own but a last special."""
        if not prompt:
            return 0
        return _prompt_length(self.encode([prompt], max_length), frozenset(self._tokenizer.all_special_ids))

    def _encode(self, texts: list[str], **how: Any) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, padding=False, return_attention_mask=False, verbose=False, **how)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _spelled(text: str, encoding: tokenizers.Encoding) -> tuple[Token, ...]:
    """Its tokens, with places in bytes where the library counts characters."""
    ends = list(accumulate((len(character.encode()) for character in text), initial=0))
    return tuple(
        Token(id, name) if special else Token(id, text[start:stop], ends[start], ends[stop])
        for id, name, special, (start, stop) in zip(
            encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
        )
    )


def characters_for(max_length: int) -> int:
    """Characters of a text that are enough for so many tokens, unless `overflows_enough` denies it."""
    return _CHARACTERS_PER_TOKEN * max_length + _CHARACTERS_MORE


def overflows_enough(tokens: int) -> bool:
    """Whether a text that was cut by characters has so many tokens past its limit that the cut did not touch others."""
    return tokens >= _ENOUGH_OVERFLOW


def encode_each(
    tokenizer: TextTokenizer, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None
) -> tuple[Tokens, dict[int, tuple[str, str]]]:
    """Token ids of each text; one that the tokenizer cannot bear has none, and an error: row -> (code, message).

    Raises:
        Exception: what the tokenizer raises for any text at all.
    """
    try:
        return tokenizer.encode(texts, max_length, firsts), {}
    except Exception:  # noqa: BLE001 - whatever it raises, it is the fault of some text, or of the tokenizer
        tokenizer.encode([HARMLESS], max_length)
    pieces, errors = [], {}
    for row, text in enumerate(texts):
        try:
            pieces.append(tokenizer.encode([text], max_length, None if firsts is None else [firsts[row]]))
        except Exception as error:  # noqa: BLE001
            pieces.append(NO_TOKENS)
            errors[row] = ("tokenizer_error", f"{type(error).__name__}: {error}")
    return join_tokens(pieces), errors


def make_tokenizer(tokenizer: PreTrainedTokenizerBase, limits: Limits) -> TextTokenizer:
    """A tokenizer of its own for one thread, from the one that a model was loaded with."""
    if not tokenizer.is_fast:
        return PythonTokenizer(tokenizer, limits)
    return FastTokenizer(
        tokenizer.backend_tokenizer, limits, frozenset(tokenizer.all_special_ids), tokenizer.truncation_side
    )


def _flatten(ids: list[list[int]], types: list[list[int]] | None = None) -> Tokens:
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)), out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(offsets[-1]))
    kinds = None if types is None else np.fromiter(chain.from_iterable(types), np.int8, int(offsets[-1]))
    return Tokens(flat, offsets, np.zeros(len(ids), np.bool_), kinds)


def _prompt_length(tokens: Tokens, special_ids: frozenset[int]) -> int:
    return len(tokens.ids) - (len(tokens.ids) > 0 and int(tokens.ids[-1]) in special_ids)
