"""Torch's attention for packed texts on a CPU, where it has no kernel: slow, plain, and broken in chosen ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as _varlen

from embedstream_worker.engines import headed_engine, packed_attention, torch_engine

assert _varlen  # importing it registers the operator

Kernel = Callable[..., torch.Tensor]
"""(query, key, value, where texts begin and the last one ends, scale, window) -> output, like the query."""


def right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: list[int],
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Scores, window, softmax: by their formulas, for each text."""
    output = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for start, stop in itertools.pairwise(starts):
        q, k, v = (states[start:stop].transpose(0, 1).float() for states in (query, key, value))
        place = torch.arange(stop - start)
        ahead = place[None, :] - place[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if window[0] >= 0:
            hidden |= -ahead > window[0]
        if window[1] >= 0:
            hidden |= ahead > window[1]
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        output[start:stop] = (weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).to(query.dtype)
    return output


_kernel: dict[str, Kernel] = {"used": right}


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    _cu_seq_k: torch.Tensor | None,
    max_q: int,
    _max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_more: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    starts = cu_seq_q.tolist()
    longest = max(stop - start for start, stop in itertools.pairwise(starts))
    assert longest <= max_q, "the kernel would not see the longest text's end"
    assert window_size is not None
    before, after = window_size
    output = _kernel["used"](
        query, key, value, starts, scale or query.shape[2] ** -0.5, (before, 0 if is_causal else after)
    )
    return output, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")(_run)


@contextmanager
def packed_at_once(monkeypatch: pytest.MonkeyPatch, kernel: Kernel = right) -> Iterator[None]:
    """The CPU counts as a device whose attention takes all texts at once, by this kernel.

    In one thread: several wait for each other by spinning, longer than these small models compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        for module in (packed_attention, torch_engine, headed_engine):
            patch.setattr(module, "is_fast", lambda _device, _dtype: True)
        patch.setitem(_kernel, "used", kernel)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
