"""The stage `kernels`: whether attention for packed texts is right on this device, before anything is built on it."""

from __future__ import annotations

import itertools

import torch

from embedstream_worker.engines.attention_check import check_attention
from embedstream_worker.engines.packed_attention import Asked, attend_at_once
from gpu_stages.context import Bench
from gpu_stages.measuring import not_waiting

_HEADS = {
    "MiniLM": (12, 12, 32),
    "BERT-base, ModernBERT": (12, 12, 64),
    "XLM-R-large": (16, 16, 64),
    "grouped": (16, 8, 128),
}
_WINDOWS = {
    "all": (-1, -1),
    "causal": (-1, 0),
    "64 around": (64, 64),
    "64 before": (63, 0),
    "4096 before": (4095, 0),
}
_LONGEST = (8192, 512, 100)


def check(bench: Bench) -> None:
    """Each shape of heads with each window, over texts of 1 to 8192 tokens."""
    longest = (64,) if bench.tiny else _LONGEST
    heads = {"tiny": (4, 2, 16)} if bench.tiny else _HEADS
    for (model, shape), (name, window) in itertools.product(heads.items(), _WINDOWS.items()):
        asked = Asked(*shape, None, window)
        with bench.part(f"attention of {model}, {name}"):
            errors = [check_attention([asked], most, bench.device) for most in longest]
            bench.note(f"attention of {model}, {name}", worst_error=float(f"{max(errors):.2g}"))
    if bench.on_gpu:
        with bench.part("waits of attention"):
            bench.note("waits of attention", **{"waits for": _waits(bench.device)})


def _waits(device: torch.device) -> str:
    states = torch.randn(1024, 12, 64, device=device, dtype=torch.bfloat16)
    starts = torch.tensor([0, 500, 1024], dtype=torch.int32, device=device)

    def attend() -> object:
        return attend_at_once(states, states, states, starts, 1024, None, (-1, -1))

    attend()
    return not_waiting(attend)
