"""The check at load of attention for packed texts: random states, in the model's own shapes, against a plain way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from embedstream_worker.engines.checking import CheckFailed
from embedstream_worker.engines.packed_attention import Asked, attend_at_once, require_fast

MOST_ERROR = 1e-2
"""Of a token's output, as a share of its length. Rounding to bfloat16 makes less than half of it; a window that is off
by one token changes some outputs by far more."""

_LENGTHS = (1, 2, 17, 127, 128, 129)  # tokens of a text; kernels work in blocks of 64 or 128
_LONGEST = 8_192  # beyond it only more blocks of the same kind come, and the plain way takes its time
_QUERIES_AT_ONCE = 1_024  # plain attention keeps a score for each pair of tokens


def check_attention(
    asked: Iterable[Asked], longest: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Compare `attend_at_once` with attention one text after the other in float32, for all that the layers ask.

    `longest`: tokens of the longest text that the model takes. Answers the largest error. Waits for the device.

    Raises:
        CheckFailed: they differ.
        CannotPack: this torch has no attention for packed texts.
        RuntimeError: its kernels refuse such heads.
    """
    require_fast()
    lengths = sorted({min(length, longest) for length in (*_LENGTHS, min(longest, _LONGEST))}, reverse=True)
    largest = 0.0
    for each in sorted(asked, key=str):
        error = _worst_error(each, lengths, device, dtype)
        if not error <= MOST_ERROR:  # NaN fails, too
            raise CheckFailed(
                f"its attention over packed texts in {str(dtype).removeprefix('torch.')} is {error:.1%} off, "
                f"more than {MOST_ERROR:.0%} ({each})"
            )
        largest = max(largest, error)
    return largest


@torch.inference_mode()
def _worst_error(asked: Asked, lengths: list[int], device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a token's output."""
    places = list(itertools.accumulate(lengths, initial=0))
    random = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(places[-1], heads, asked.head_dim, generator=random, device=device).to(dtype)
        for heads in (asked.heads, asked.key_heads, asked.key_heads)
    )
    starts = torch.tensor(places, dtype=torch.int32, device=device)
    ours = attend_at_once(query, key, value, starts, max(lengths), asked.scaling, asked.window)
    groups = asked.heads // asked.key_heads
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    worst = torch.zeros((), device=device)
    for start, stop in itertools.pairwise(places):
        for first in range(start, stop, _QUERIES_AT_ONCE):
            queries = slice(first, min(first + _QUERIES_AT_ONCE, stop))
            theirs = _attend_plainly(query[queries], key[start:stop], value[start:stop], first - start, asked)
            errors = (ours[queries].float() - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
            worst = torch.maximum(worst, errors.max())  # carries NaN on
    return worst.item()


def _attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, asked: Asked
) -> torch.Tensor:
    """Some tokens of one text attend to all of it in float32: [queries, heads, head's dim]. `first`: their place."""
    before, after = asked.window
    place = torch.arange(len(key), device=key.device)
    ahead = place - place[first : first + len(query), None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if before >= 0:
        seen &= ahead >= -before
    if after >= 0:
        seen &= ahead <= after
    q, k, v = (states.float().transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=asked.scaling)
    return output.squeeze(0).transpose(0, 1)
