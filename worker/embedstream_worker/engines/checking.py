"""The check at load: is a faster way through the model still the same model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Ragged, Values
from embedstream.outputs import Kind
from embedstream_worker.batching import gather_batch, join_tokens
from embedstream_worker.engines.base import HARMLESS, Results, TokenBatch, Tokens
from embedstream_worker.engines.calibration import check_texts
from embedstream_worker.engines.precision import Precision
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.tokenizing import encode_each

Vectors = npt.NDArray[np.float32]

CHECK_BATCHES = "2"
"""Part of the key under which their references are kept: to be raised when `check_batches` changes."""

LOWEST_COSINE: dict[Precision, float] = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.8}
"""What a check text's vector must reach against the padded float32 path. int8 is asked for by name, and its cosine
shown: its bound only tells a rounded model from a broken one."""

_NORM_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 2e-2, "int8": 0.5}
"""How far a vector's length may be off, as a share of it: cosine alone does not see that."""

MOST_OFF = 1e-4
"""How far numbers of other kinds than dense may be off in float32; if some are above 1, as a share of the greatest."""

MOST_OFF_IN_BFLOAT16: dict[Kind, float] = {"sparse": 0.1, "multivector": 0.02, "score": 0.01, "labels": 0.01}
"""The same in bfloat16: the worst of tens of thousands of weights a text, whose vectors still have cosine 0.999; of
thousands of numbers of its tokens' vectors; of one score.
"""

_CHECK_TOKENS = 64  # of each; the original takes a second for a thousand tokens of a base model
_LONGEST_CHECK_TOKENS = 384  # of one text; beyond that the shape changes nothing
_PROMPT_TOKENS = 3


class CheckFailed(Exception):
    """A faster way through the model gives other results."""


@dataclass(frozen=True)
class Agreement:
    """How well vectors agree with their references."""

    lowest: float
    mean: float
    worst_norm: float  # largest |length / reference's length - 1|


def check_batches(model: TextModel) -> list[TokenBatch]:
    """Padded batches: many texts of uneven length; a long text beside a short one; the short one alone.

    The first is left out for roles after the first: another way through the model shows in any text. All are there
    with a prompt left out, too, if it can be; and for models that take pairs, as pairs and as single texts.
    """
    limit = min(model.input.max_length, _LONGEST_CHECK_TOKENS)
    texts = check_texts()
    tokenizer = model.input.tokenizer()
    uneven, _ = encode_each(tokenizer, [*texts, HARMLESS], min(limit, _CHECK_TOKENS))
    alone, _ = encode_each(tokenizer, texts[:1], min(limit, _CHECK_TOKENS))
    long = uneven.ids[:limit]  # not from a text that is cut: no tokenizer can be told to bear any end of a text
    beside = join_tokens([alone, Tokens(long, np.array([0, len(long)]), np.zeros(1, np.bool_))])
    many, few = [uneven], [beside, alone]
    if model.pairs:
        pairs, pair = (
            encode_each(tokenizer, some, min(limit, 2 * _CHECK_TOKENS), some[::-1])[0] for some in (texts, texts[:1])
        )
        many, few = [uneven, pairs], [beside, alone, pair]
    prompts = (0, _PROMPT_TOKENS) if model.excludes_prompt else (0,)
    batches: list[TokenBatch] = []
    for role in model.roles:
        for tokens in few if batches else many + few:
            for prompt_length in prompts:
                # A text that is nothing but prompt leaves pooling nothing to pool, in every engine in its own way.
                kept = np.flatnonzero(tokens.lengths > prompt_length + 1)
                if len(kept):
                    batches.append(gather_batch(tokens, kept, prompt_length, role))
    return batches


def check(ours: Sequence[Results], theirs: Sequence[Results], precision: Precision) -> str:
    """How well they agree, in words. Raises `CheckFailed` for results that are not the model's."""
    said = []
    kinds: list[Kind] = [*theirs[0]]
    for kind in kinds:
        pairs = [(one[kind], other[kind]) for one, other in zip(ours, theirs, strict=True)]
        if kind == "dense":
            agreement = compare([one["dense"] for one in ours], [other["dense"] for other in theirs])
            require(agreement, precision)
            said.append(f"cosine at least {agreement.lowest:.5f}, on average {agreement.mean:.5f}")
        else:
            said.append(f"{kind} off by at most {_require_near(kind, pairs, precision):.2g}")
    return "; ".join(said)


def _require_near(kind: Kind, pairs: Sequence[tuple[Values, Values]], precision: Precision) -> float:
    """The greatest difference. Raises `CheckFailed` if it is too great."""
    off = max(difference(one, other) for one, other in pairs)
    greatest = max(np.abs(_numbers(other)).max(initial=1.0) for _, other in pairs)
    most = greatest * (MOST_OFF if precision == "float32" else MOST_OFF_IN_BFLOAT16[kind])
    if not off <= most:
        raise CheckFailed(f"its {kind} results in {precision} are off by {off:.2g}, more than {most:.2g}")
    return off


def difference(ours: Values, theirs: Values) -> float:
    """The greatest of two results of the same texts; infinite if these are not of one shape, or not finite."""
    if isinstance(ours, Ragged) and isinstance(theirs, Ragged) and theirs.indices is not None:
        ours, theirs = _aligned(ours, theirs)
    elif isinstance(ours, Ragged) and isinstance(theirs, Ragged) and (ours.counts != theirs.counts).any():
        return np.inf
    one, other = _numbers(ours), _numbers(theirs)
    if one.shape != other.shape or not np.isfinite(one).all():
        return np.inf
    return float(np.abs(one - other).max(initial=0.0))


def _aligned(ours: Ragged, theirs: Ragged) -> tuple[Vectors, Vectors]:
    """The weights [any] of two sparse results, by the same tokens.

    A weight that one of them leaves out is below all that it keeps of the text: 0, or as much of it as it may be.
    """
    places = [
        np.repeat(np.arange(len(each), dtype=np.int64), each.counts) << 32 | each.indices
        for each in (ours, theirs)
        if each.indices is not None
    ]
    every = np.unique(np.concatenate(places))
    weights = [np.full(len(every), -1, np.float32) for _ in places]
    for mine, found, each in zip(weights, places, (ours, theirs), strict=True):
        mine[np.searchsorted(every, found)] = each.values
    made = []
    for mine, other, each in zip(weights, reversed(weights), (ours, theirs), strict=True):
        least = np.full(len(each), np.inf, np.float32)
        np.minimum.at(least, np.repeat(np.arange(len(each)), each.counts), each.values)
        least[each.counts == 0] = 0
        made.append(np.where(mine == -1, np.minimum(other, least[every >> 32]), mine))
    return made[0], made[1]


def _numbers(values: Values) -> Vectors:
    return values.values if isinstance(values, Ragged) else values


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
