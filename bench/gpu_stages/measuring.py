"""Measuring an engine on its device: how fast, how busy, with which kernels, and whether it waits."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import TokenBatch, Tokens
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.text_engine import TextEngine
from embedstream_worker.engines.torch_engine import Batches, TorchEngine
from embedstream_worker.models import resolve_model
from gpu_stages.context import Bench
from gpu_stages.material import Lengths, Work

WINDOW_TOKENS = 1 << 20
"""Sorted together, as a worker with a GPU sorts them."""

_PROFILED_BATCHES = 24
_TOP = 10
_LONGEST_NAME = 90
_ATTENTION = re.compile(r"flash|fmha|attention|attn", re.IGNORECASE)
_PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|addmm|::mm\b|::linear", re.IGNORECASE)


@dataclass(frozen=True)
class Started:
    """An engine that runs, and what to note of its start."""

    engine: TorchEngine
    figures: dict[str, Any]


def start_engine(bench: Bench, folder: Path, *, padded: bool = False, compiles: bool = False) -> Started:
    """As a worker starts it. That it runs otherwise than wanted is in what it `said`."""
    batches: Batches = "padded" if padded or not bench.packs else "packed"
    dtype: Dtype = "auto" if bench.on_gpu else "float32"
    begun = time.perf_counter()
    with warnings_said() as said:
        engine = TorchEngine(resolve_model(str(folder)), str(bench.device), dtype, batches, compiles)
    figures: dict[str, Any] = {
        "seconds_to_start": round(time.perf_counter() - begun, 1),
        "ran": f"{'padded' if engine.info.padded else 'packed'}, {engine.info.dtype}",
        "budget": engine.info.batch_tokens,
    }
    if said:
        figures["said"] = "; ".join(said)
    return Started(engine, figures)


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """What the worker's code warns of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("embedstream_worker")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """What one call takes on the device, launched back to back for about so many seconds."""
    for _ in range(3):
        run()
    wait_for(device)
    begun = time.perf_counter()
    run()
    wait_for(device)
    calls = max(3, int(seconds / max(time.perf_counter() - begun, 1e-6)))
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - begun) / calls


def cut(tokens: Tokens, budget: int, padded: bool) -> list[npt.NDArray[np.int64]]:
    """Batches of texts as they come, sorted within a window."""
    ends = np.searchsorted(tokens.offsets[1:], np.arange(WINDOW_TOKENS, tokens.offsets[-1], WINDOW_TOKENS)) + 1
    windows = np.split(np.arange(len(tokens.lengths)), ends)
    return [
        window[batch]
        for window in windows
        if len(window)
        for batch in cut_batches(tokens.lengths[window], budget, padded)
    ]


def drive(engine: TextEngine, batches: Iterator[TokenBatch]) -> int:
    """Run batches as a worker does, as many in flight as the engine wants; how many tokens they had."""
    done = 0
    with ThreadPoolExecutor(engine.in_flight) as pool:
        flying: deque[tuple[int, Future[Any]]] = deque()

        def land() -> int:
            count, future = flying.popleft()
            future.result()
            return count

        for batch in batches:
            flying.append((len(batch.ids), pool.submit(engine.run, batch)))
            if len(flying) >= engine.in_flight:
                done += land()
        while flying:
            done += land()
    return done


def rate(engine: TextEngine, tokens: Tokens, work: Work, seconds: float, budget: int | None = None) -> dict[str, Any]:
    """The engine alone on token ids, for about so many seconds, after a warm-up. Padding counts as no work."""
    info = engine.info
    budget = budget or info.batch_tokens
    cuts = cut(tokens, budget, info.padded)
    engine.warm_up(budget)
    drive(engine, (gather_batch(tokens, rows, 0, "document") for rows in cuts[:4]))
    end, started = time.perf_counter() + seconds, list[npt.NDArray[np.int64]]()

    def batches() -> Iterator[TokenBatch]:
        for rows in itertools.cycle(cuts):
            if started and time.perf_counter() > end:
                return
            started.append(rows)
            yield gather_batch(tokens, rows, 0, "document")

    begun = time.perf_counter()
    done = drive(engine, batches())
    taken = time.perf_counter() - begun
    lengths = [tokens.lengths[rows] for rows in started]
    computed = sum(int(some.max()) * len(some) if info.padded else int(some.sum()) for some in lengths)
    return {
        "budget": budget,
        "tokens_per_second": round(done / taken),
        "tflops": round(sum(map(work.flops, lengths)) / taken / 1e12, 3),
        "padding": round(1 - done / computed, 4),
    }


def profile_of(engine: TorchEngine, tokens: Tokens, work: Work, device: torch.device) -> dict[str, Any]:
    """What runs on the device over some batches: the kernels that take most, and the time between kernels.

    Shares are of the time of all kernels; on a CPU operators stand for kernels.
    """
    cuts = cut(tokens, engine.info.batch_tokens, engine.info.padded)[:_PROFILED_BATCHES]
    on_gpu = device.type == "cuda"
    batches = (gather_batch(tokens, rows, 0, "document") for rows in cuts)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        if on_gpu:
            drive(engine, batches)
        else:  # operators are seen in this thread alone
            for batch in batches:
                engine.run(batch)
    taken: Counter[str] = Counter()
    ranges: list[tuple[float, float]] = []
    for event in trace.events():
        if on_gpu and event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
            taken[event.name] += event.time_range.elapsed_us()
            ranges.append((event.time_range.start, event.time_range.end))
        elif not on_gpu:
            taken[event.name] += event.self_cpu_time_total
    whole = sum(taken.values())
    if not whole:
        raise RuntimeError("the profiler saw nothing run on the device")
    attention = sum(some for name, some in taken.items() if _ATTENTION.search(name))
    products = sum(some for name, some in taken.items() if _PRODUCTS.search(name) and not _ATTENTION.search(name))
    lengths: Lengths = np.concatenate([tokens.lengths[rows] for rows in cuts])
    figures: dict[str, Any] = {
        "products": round(products / whole, 3),
        "products_tflops": round(work.products(lengths) / products / 1e6, 1) if products else None,
        "attention": round(attention / whole, 3),
        "top": [[name[:_LONGEST_NAME], round(some / whole, 3)] for name, some in taken.most_common(_TOP)],
    }
    if on_gpu:
        figures["device_busy"] = round(busy_share(ranges), 3)
    return figures


def busy_share(ranges: list[tuple[float, float]]) -> float:
    """Share of the time from the first range's start to the last one's end that some range covers."""
    begun, end = min(ranges)[0], max(stop for _, stop in ranges)
    busy, until = 0.0, begun
    for start, stop in sorted(ranges):
        busy += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return busy / (end - begun)


def waits_of(engine: TorchEngine, tokens: Tokens) -> str:
    """What makes the host wait for the device in a batch, before its own result is there."""
    rows = cut(tokens, engine.info.batch_tokens, engine.info.padded)[0]
    batch = gather_batch(tokens, rows, 0, "document")
    for _ in range(engine.in_flight):
        engine.run(batch)
    return not_waiting(lambda: engine.run(batch))


def not_waiting(run: Callable[[], object]) -> str:
    """The first thing for which the host waits for a CUDA device, or "nothing"."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nothing"
