"""WordPiece in a tokenizer that is dozens of times as fast, as long as it gives the token ids that the usual one gives.

The package `nanotoken` is optional. It is young: each model's is compared with the usual one on texts that are hard to
split, and then on some rows of every window.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from embedstream_worker.engines.base import TextTokenizer, Tokens
from embedstream_worker.engines.calibration import calibration_texts
from embedstream_worker.inputs import cut_characters
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.tokenizing import FastTokenizer, characters_for, overflows_enough

log = logging.getLogger(__name__)

_CHECK_TOKENS = (16, 256)
_HARD = (
    "",
    " \t\n ",
    "[CLS] [SEP]in[MASK] [PAD] [UNK] </s> <s> <mask>",
    "İstanbul'da ΟΔΥΣΣΕΥΣ, ẞtraße, ŉaïve Å Å ﬁne ﷺ",
    "東京都に住む한국어 ภาษาไทย हिन्दी עִבְרִית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0323 \u200b\u200d\ufeff\u00ad\x00\x07\x7f\ufffd\U000e0001",
    "a\u00a0b\u2003c\u3000d\u2028e\x85f x_y-z…—“q” $1,000.00 #@! ^`~ 1e-5 C++",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101,
)


class QuickTokenizer:
    """Around a tokenizer of nanotoken, for one thread. Pairs, and what it raises an error for, go the usual way."""

    def __init__(self, usual: FastTokenizer) -> None:
        """Raises whatever the package raises for a tokenizer that it does not know."""
        # Imported only here: the package need not be installed.
        import nanotoken

        self._usual = usual
        with panics_are_errors():
            self._quick = nanotoken.WordPieceTokenizer.from_json(usual.as_json())

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        """As `FastTokenizer.encode`."""
        if firsts is not None:
            return self._usual.encode(texts, max_length, firsts)
        self._usual.limits.check(max_length)
        try:
            return self._encode(texts, max_length)
        except Exception:  # noqa: BLE001 - whatever it raises: what is wrong with a text is for the usual one to say
            return self._usual.encode(texts, max_length)

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """As `FastTokenizer.prompt_length`."""
        return self._usual.prompt_length(prompt, max_length)

    def _encode(self, texts: Sequence[str], max_length: int) -> Tokens:
        side = self._usual.truncation_side
        inputs, cut = cut_characters(texts, characters_for(max_length), side == "left")
        how: Any = {"add_special_tokens": self._usual.add_special_tokens, "truncation_side": side, "parallel": False}
        with panics_are_errors():
            ids, offsets = self._quick.encode_batch(inputs, **how)
            lengths = np.diff(offsets)
            if any(not overflows_enough(int(lengths[row]) - max_length) for row in cut):
                inputs = list(texts)
                ids, offsets = self._quick.encode_batch(inputs, **how)
                lengths = np.diff(offsets)
            truncated = lengths > max_length
            if truncated.any():
                ids, offsets = self._quick.encode_batch(inputs, max_length=max_length, **how)
        return Tokens(ids.astype(np.int32), offsets.astype(np.int64), truncated)


def quick_tokenizer(usual: TextTokenizer) -> QuickTokenizer | None:
    """A quick one in place of the usual one; None where the package is not installed, or does not give the same."""
    if not isinstance(usual, FastTokenizer) or importlib.util.find_spec("nanotoken") is None:
        return None
    try:
        quick = QuickTokenizer(usual)
    except Exception as error:  # noqa: BLE001 - one that it does not know is no trouble
        log.info("the package nanotoken cannot split texts for this model (%s)", error)
        return None
    texts = [*_HARD, *calibration_texts()]
    for max_length in {min(usual.limits.longest, max(usual.limits.shortest, most)) for most in _CHECK_TOKENS}:
        if not same_tokens(quick.encode(texts, max_length), usual.encode(texts, max_length)):
            log.info("the package nanotoken is not used: it splits texts otherwise than this model's own tokenizer")
            return None
    return quick


def same_tokens(some: Tokens, others: Tokens) -> bool:
    """Whether texts have the same token ids and flags."""
    return (
        np.array_equal(some.offsets, others.offsets)
        and np.array_equal(some.ids, others.ids)
        and np.array_equal(some.truncated, others.truncated)
    )
