"""What packed batches look like to the device: no text without tokens, and a number of tokens that comes again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from embedstream_worker.engines.base import TokenBatch

TOKENS_STEP = 512
"""GPU batches have a multiple of so many tokens: kernels are chosen, and compiled, for each number anew."""

_SHORTEST = 64


def only(batch: TokenBatch, kept: npt.NDArray[np.bool_]) -> TokenBatch:
    """The batch without texts that have no token: `kept`, bool [n], is true for all others."""
    return replace(batch, offsets=batch.offsets[np.concatenate([[True], kept])])


def fill_up(batch: TokenBatch, step: int, longest: int) -> TokenBatch:
    """The batch with more texts at its end, of `longest` tokens at most, so that its tokens are a multiple of `step`.

    `longest`: what the model can place.
    """
    total = len(batch.ids)
    missing = -total % step
    if missing == 0:
        return batch
    ends = np.minimum(np.arange(longest, missing + longest, longest), missing) + total
    return replace(
        batch,
        ids=np.concatenate([batch.ids, np.resize(batch.ids, missing)]),
        offsets=np.concatenate([batch.offsets, ends]),
        types=None if batch.types is None else np.concatenate([batch.types, np.zeros(missing, np.int8)]),
        longest=max(batch.longest, min(missing, longest)),
    )


def bound(longest: int) -> int:
    """A power of two that no text of `longest` tokens exceeds, so that few numbers reach the kernels."""
    return max(_SHORTEST, 1 << max(longest - 1, 0).bit_length())
