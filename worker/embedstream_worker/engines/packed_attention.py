"""Attention over texts that lie behind each other without padding, for transformers' attention interface."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "embedstream_packed"
"""As `set_attn_implementation` knows it. No mask function goes by this name, so models make no mask for it."""

_NOT_SERVED = ("softcap", "position_bias", "s_aux", "head_mask")
"""What some models ask of attention beside the usual, under transformers' names."""


class CannotPack(Exception):
    """The model asks something of attention that the packed one does not do."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Each text attends to itself alone. Query, key and value: [1, heads, total, head's dim]; answer: [1, total, ...].

    `cu_seq_lens_q`: where texts begin and the last one ends, int32 [n + 1]; `max_length_q`: the longest text's tokens.
    `sliding_window`: a token sees those less than so many places away. Half precision on CUDA goes through
    `varlen_attn`; everything else through one call for each text, which is slow and what the other is checked against.

    Raises:
        CannotPack: the model wants more of attention than this, or does not hand the texts' places on.
    """
    asked = [name for name in _NOT_SERVED if others.get(name) is not None]
    if attention_mask is not None or asked:
        raise CannotPack(f"its attention takes {' and '.join(asked or ['a mask'])}")
    if cu_seq_lens_q is None or max_length_q is None:
        raise CannotPack("it does not tell its attention where texts begin")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # [total, heads, head's dim]: views, as models compute their heads side by side.
    flat_query, flat_key, flat_value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    before = -1 if sliding_window is None else sliding_window - 1
    window = (before, 0 if causal else before)
    fast = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    run = _attend_at_once if fast else _attend_one_by_one
    output = run(flat_query, flat_key, flat_value, cu_seq_lens_q, max_length_q, scaling, window)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attend)


def _attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    function, shares_heads = _varlen()
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if shares_heads:
            options["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output: torch.Tensor = function(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **options
    )
    return output


def _attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    _longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    places = starts.tolist()
    outputs = []
    for start, stop in itertools.pairwise(places):
        q, k, v = (states[start:stop].transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, _window_mask(stop - start, window, q.device), scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _window_mask(length: int, window: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """What each token of a text may see, [length, length]; a bound below 0 is none."""
    before, after = window
    if before < 0 and after < 0:
        return None
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    mask = torch.ones_like(ahead, dtype=torch.bool)
    if before >= 0:
        mask &= ahead >= -before
    if after >= 0:
        mask &= ahead <= after
    return mask


@functools.cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """Torch's attention for packed texts, and whether it lets queries share keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise CannotPack(f"torch {torch.__version__} has no attention for packed texts; use 2.11 or newer") from error
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        raise CannotPack(f"torch {torch.__version__} has too old an attention for packed texts; use 2.11 or newer")
    return varlen_attn, "enable_gqa" in parameters
