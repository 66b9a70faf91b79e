"""The stages `ceilings` and `fp8`: what the device, and the tokenizer beside it, can do at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.nn import functional

from embedstream.machine import cpu_cores
from embedstream_worker.engines.packed_attention import attend_at_once
from gpu_stages.context import Bench
from gpu_stages.measuring import seconds_each

PEAK = "matrix product"
"""The figure that rates are shares of; its `tflops`."""

_PRODUCTS = {"QKV": (768, 2304), "attention's output": (768, 768), "up": (768, 3072), "down": (3072, 768)}
"""BERT-base's, from so many columns to so many."""
_TOKENS = 65_536  # of a batch
_TOKENIZED_SECONDS = 1.0


def measure(bench: Bench) -> None:
    """The products first: all rates are told as shares of them."""
    size, tokens = (256, 128) if bench.tiny else (8192, _TOKENS)
    with torch.inference_mode():
        a, b = _random(bench, size, size), _random(bench, size, size)
        taken = seconds_each(lambda: a @ b, bench.device, 2.0 if bench.on_gpu and not bench.tiny else bench.seconds)
        bench.note(PEAK, size=size, dtype=str(bench.dtype), tflops=_tflops(2.0 * size**3, taken))
        for name, (columns, wanted) in _PRODUCTS.items():
            with bench.part(f"product: {name}"):
                _product(bench, name, columns, wanted, tokens)
        with bench.part("LayerNorm"):
            states, weight = _random(bench, tokens, 768), _random(bench, 768)
            taken = _short(bench, lambda: functional.layer_norm(states, (768,), weight, weight))
            bench.note("LayerNorm", tokens=tokens, microseconds=_micro(taken), GB_s=_rate(2 * _bytes(states), taken))
        with bench.part("copy"):
            source = torch.empty((1 << 22) if bench.tiny else (1 << 31), dtype=torch.uint8, device=bench.device)
            target = torch.empty_like(source)
            taken = _short(bench, lambda: target.copy_(source))
            bench.note("copy", GB_s=_rate(2 * _bytes(source), taken))
        for length in (100, 128, 512):
            with bench.part(f"attention, texts of {length}"):
                _attention(bench, length, tokens)
    with bench.part("tokenizer"):
        _tokenizers(bench)


def fp8(bench: Bench) -> None:
    """Products with a scale for each row, and what rounding their input costs."""
    if not (bench.on_gpu and torch.cuda.get_device_capability(bench.device) >= (8, 9)):
        bench.note("FP8", skipped="this device has none")
        return
    with torch.inference_mode():
        for name, (columns, wanted) in _PRODUCTS.items():
            with bench.part(f"FP8 product: {name}"):
                _fp8_product(bench, name, columns, wanted)


def _fp8_product(bench: Bench, name: str, columns: int, wanted: int) -> None:
    states = _random(bench, _TOKENS, columns)
    left, left_scale = _rounded(states)
    right, right_scale = _rounded(_random(bench, wanted, columns))

    def multiply() -> object:
        return torch._scaled_mm(
            left, right.t(), left_scale, right_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    taken, rounding = _short(bench, multiply), _short(bench, lambda: _rounded(states))
    tflops = _tflops(2.0 * _TOKENS * columns * wanted, taken)
    bench.note(
        f"FP8 product: {name}", tflops=tflops, microseconds=_micro(taken), microseconds_to_round=_micro(rounding)
    )


def _rounded(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In FP8, [rows, columns], and what each row was divided by, [rows, 1]."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = (states.abs().amax(dim=1, keepdim=True).float() / most).clamp_(min=1e-12)
    return (states.float() / scale).to(torch.float8_e4m3fn), scale


def _product(bench: Bench, name: str, columns: int, wanted: int, tokens: int) -> None:
    states, weight, bias = _random(bench, tokens, columns), _random(bench, wanted, columns), _random(bench, wanted)

    def plain() -> torch.Tensor:
        return functional.linear(states, weight, bias)

    forms: dict[str, Callable[[], torch.Tensor]] = {name: plain}
    if name == "up":
        forms["up, then GELU"] = lambda: functional.gelu(plain())
        forms["up, GELU within"] = lambda: torch._addmm_activation(bias, states, weight.t(), use_gelu=True)
    for form, run in forms.items():
        taken = _short(bench, run)
        tflops = _tflops(2.0 * tokens * columns * wanted, taken)
        bench.note(f"product: {form}", tokens=tokens, tflops=tflops, microseconds=_micro(taken))


def _attention(bench: Bench, length: int, tokens: int) -> None:
    texts = max(1, tokens // length)
    states = _random(bench, texts * length, 12, 64)
    starts = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=bench.device)
    taken = _short(bench, lambda: attend_at_once(states, states, states, starts, length, None, (-1, -1)))
    flops = 4.0 * texts * length**2 * 768
    bench.note(
        f"attention, texts of {length}", tokens=texts * length, tflops=_tflops(flops, taken), microseconds=_micro(taken)
    )


def _tokenizers(bench: Bench) -> None:
    """Tokens a second by threads of Python's and of the library's own."""
    from gpu_stages import material  # loads what the rest of this stage can do without

    model = material.minilm(bench)
    texts = bench.scratch / "texts-to-tokenize.json"
    lengths = material.lognormal_lengths(50_000 if bench.tiny else 2_000_000)
    texts.write_text(json.dumps(material.RealText(bench).cut(lengths)))
    cores = cpu_cores()
    grid = ((1, 0), (3, max(1, cores - 3))) if bench.tiny else ((1, 0), (1, cores), (3, max(1, cores - 3)), (8, 0))
    for threads, pool in grid:
        command = [sys.executable, "-m", "gpu_stages.tokenizer_rate", str(model / "tokenizer.json"), str(texts)]
        found = subprocess.run(
            [*command, str(threads), str(0.05 if bench.tiny else _TOKENIZED_SECONDS)],
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": "true" if pool else "false",
                "RAYON_NUM_THREADS": str(pool or 1),
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        what = f"tokenizer, {threads} threads, {f'a pool of {pool}' if pool else 'no pool'}"
        bench.note(what, M_tokens_s=round(float(found.stdout) / 1e6, 3))


def _random(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device).to(bench.dtype)


def _short(bench: Bench, run: Callable[[], object]) -> float:
    return seconds_each(run, bench.device, bench.seconds / 10)


def _bytes(states: torch.Tensor) -> int:
    return states.numel() * states.element_size()


def _tflops(flops: float, seconds: float) -> float:
    return float(f"{flops / seconds / 1e12:.4g}")


def _rate(count: int, seconds: float) -> float:
    return float(f"{count / seconds / 1e9:.4g}")


def _micro(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
