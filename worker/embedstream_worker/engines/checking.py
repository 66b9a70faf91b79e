"""The check at load: is a faster way through the model still the same model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedstream_worker.batching import join_tokens
from embedstream_worker.engines.base import HARMLESS, Role, TokenBatch, Tokens
from embedstream_worker.engines.calibration import calibration_texts
from embedstream_worker.engines.precision import Precision
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.tokenizing import encode_each

Vectors = npt.NDArray[np.float32]

LOWEST_COSINE: dict[Precision, float] = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.8}
"""What a check text's vector must reach against the padded float32 path. int8 is asked for by name, and its cosine
shown: its bound only tells a rounded model from a broken one."""

_NORM_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 2e-2, "int8": 0.5}
"""How far a vector's length may be off, as a share of it: cosine alone does not see that."""

_CHECK_TEXTS = 12
_LONGEST_CHECK_TOKENS = 384  # beyond the shape changes nothing, and the reference takes its time
_PROMPT_TOKENS = 3


class CheckFailed(Exception):
    """A faster way through the model gives other vectors."""


@dataclass(frozen=True)
class Agreement:
    """How well vectors agree with their references."""

    lowest: float
    mean: float
    worst_norm: float  # largest |length / reference's length - 1|


def check_batches(model: TextModel) -> list[TokenBatch]:
    """Padded batches of uneven length for every role, a text alone, and one with a prompt left out if it can be."""
    limit = min(model.input.max_length, _LONGEST_CHECK_TOKENS)
    texts = calibration_texts()[:: len(calibration_texts()) // _CHECK_TEXTS][:_CHECK_TEXTS]
    tokenizer = model.input.tokenizer()
    short, _ = encode_each(tokenizer, [*texts, HARMLESS], limit)
    long = short.ids[:limit]  # not from a text that is cut: no tokenizer can be told to bear any end of a text
    uneven = join_tokens([short, Tokens(long, np.array([0, len(long)]), np.zeros(1, np.bool_))])
    alone, _ = encode_each(tokenizer, [texts[0]], limit)
    prompts = (0, _PROMPT_TOKENS) if model.excludes_prompt else (0,)
    batches = []
    for role in model.roles:
        for tokens in (uneven, alone):
            for prompt_length in prompts:
                # A text that is nothing but prompt leaves pooling nothing to pool, in every engine in its own way.
                keep = tokens.lengths > prompt_length + 1
                if keep.any():
                    rows = [tokens.ids[a:b] for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
                    batches.append(
                        _batch([row for row, kept in zip(rows, keep, strict=True) if kept], prompt_length, role)
                    )
    return batches


def _batch(rows: Sequence[npt.NDArray[np.int32]], prompt_length: int, role: Role) -> TokenBatch:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return TokenBatch(np.concatenate(rows), offsets, max(map(len, rows)), prompt_length, role)


def compare(vectors: Sequence[Vectors], references: Sequence[Vectors]) -> Agreement:
    """How well they agree, over all batches. Not finite counts as no agreement at all."""
    ours, theirs = np.concatenate(vectors).astype(np.float64), np.concatenate(references).astype(np.float64)
    if not np.isfinite(ours).all():
        return Agreement(lowest=-1.0, mean=-1.0, worst_norm=np.inf)
    our_norms, their_norms = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    floor = np.finfo(np.float32).tiny
    cosines = (ours * theirs).sum(axis=1) / np.maximum(our_norms * their_norms, floor)
    norms = np.abs(our_norms / np.maximum(their_norms, floor) - 1)
    return Agreement(float(cosines.min()), float(cosines.mean()), float(norms.max()))


def require(agreement: Agreement, precision: Precision) -> None:
    """Raise `CheckFailed` for vectors that are not the model's, within what the precision allows."""
    if not agreement.lowest >= LOWEST_COSINE[precision]:
        raise CheckFailed(
            f"its vectors in {precision} have cosine {agreement.lowest:.6f} to those in float32, "
            f"below {LOWEST_COSINE[precision]}"
        )
    if not agreement.worst_norm <= _NORM_TOLERANCE[precision]:
        raise CheckFailed(f"its vectors in {precision} are up to {agreement.worst_norm:.1%} off in length")
