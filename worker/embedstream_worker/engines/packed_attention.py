"""Attention over texts that lie behind each other without padding, for transformers' attention interface."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    _OPTIONS: frozenset[str] = frozenset()
else:
    _OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)

NAME = "embedstream_packed"
"""As `set_attn_implementation` knows it. No mask function goes by this name, so models make no mask for it."""

_NOT_SERVED = ("softcap", "position_bias", "s_aux", "head_mask")
"""What some models ask of attention beside the usual, under transformers' names."""


class CannotPack(Exception):
    """The model asks something of attention that the packed one does not do."""


class Asked(NamedTuple):
    """What one layer asks of packed attention, whatever the texts."""

    heads: int
    key_heads: int
    head_dim: int
    scaling: float | None
    window: tuple[int, int]
    """How many tokens before and after its own a token sees; below 0: all."""


def is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention there goes through `varlen_attn`, all texts at once."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def require_fast() -> None:
    """Raise `CannotPack` if this torch's attention for packed texts is none, or too old."""
    if not {"scale", "window_size"} <= _OPTIONS:
        raise CannotPack(f"torch {torch.__version__} has no such attention for packed texts; use 2.11 or newer")


@contextmanager
def noting() -> Iterator[set[Asked]]:
    """Collects what layers ask of packed attention meanwhile."""
    asked: set[Asked] = set()
    registered = ALL_ATTENTION_FUNCTIONS[NAME]

    def note(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *states: torch.Tensor | None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        window = _window(module, options.get("sliding_window"), options.get("is_causal"))
        asked.add(Asked(query.shape[1], key.shape[1], query.shape[3], options.get("scaling"), window))
        answer: tuple[torch.Tensor, None] = registered(module, query, key, *states, **options)
        return answer

    AttentionInterface.register(NAME, note)
    try:
        yield asked
    finally:
        AttentionInterface.register(NAME, registered)


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
    `sliding_window`: a token sees those less than so many places away. What `is_fast` goes through `varlen_attn`, which
    must be there (`require_fast`); everything else through one call for each text, which is slow.

    Raises:
        CannotPack: the model wants more of attention than this, or does not hand the texts' places on.
    """
    asked = [name for name in _NOT_SERVED if others.get(name) is not None]
    if attention_mask is not None or asked:
        raise CannotPack(f"its attention takes {' and '.join(asked or ['a mask'])}")
    if cu_seq_lens_q is None or max_length_q is None:
        raise CannotPack("it does not tell its attention where texts begin")
    # [total, heads, head's dim]: views, as models compute their heads side by side.
    flat_query, flat_key, flat_value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    window = _window(module, sliding_window, is_causal)
    run = attend_at_once if is_fast(query.device, query.dtype) else _attend_one_by_one
    output = run(flat_query, flat_key, flat_value, cu_seq_lens_q, max_length_q, scaling, window)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attend)


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """Torch's attention for packed texts. Query: [total, heads, head's dim], as the answer; key and value alike, with
    heads that divide the query's. `longest`: no text has more tokens.
    """
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _OPTIONS:
            options["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **options
    )
    assert isinstance(output, torch.Tensor)  # not a pair, as nothing else is asked for
    return output


def _window(module: torch.nn.Module, sliding_window: int | None, is_causal: bool | None) -> tuple[int, int]:
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    before = -1 if sliding_window is None else sliding_window - 1
    return before, 0 if causal else before


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
