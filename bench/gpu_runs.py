"""Runs of the GPU benchmark: the chip's own peak, the engine alone, and sentence-transformers' `encode`."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_material import Work
from sentence_transformers import SentenceTransformer
from torch.profiler import ProfilerActivity, profile

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import TokenBatch, Tokens
from embedstream_worker.engines.torch_engine import TorchEngine

WINDOW_TOKENS = 1 << 20
"""Sorted together, as a worker with a GPU sorts them."""

_PEAK_RUNS = 30
_PROFILED_BATCHES = 24


@dataclass(frozen=True)
class Rate:
    """What a run reached, counting the texts' own tokens and no padding."""

    tokens_per_second: float
    flops_per_second: float
    padding: float
    """Share of the computed tokens that are padding."""


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a square matrix product of random numbers, the median of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(5):
        a @ b
    seconds = []
    for _ in range(_PEAK_RUNS):
        wait_for(device)
        begun = time.perf_counter()
        for _ in range(4):  # so that the host's own time to launch and to wait vanishes
            a @ b
        wait_for(device)
        seconds.append((time.perf_counter() - begun) / 4)
    return 2.0 * size**3 / statistics.median(seconds)


def windows_of(tokens: Tokens, budget: int, padded: bool) -> list[npt.NDArray[np.int64]]:
    """Batches of texts as they come, sorted within a window."""
    ends = np.searchsorted(tokens.offsets[1:], np.arange(WINDOW_TOKENS, tokens.offsets[-1], WINDOW_TOKENS)) + 1
    windows = np.split(np.arange(len(tokens.lengths)), ends)
    return [
        window[batch]
        for window in windows
        if len(window)
        for batch in cut_batches(tokens.lengths[window], budget, padded)
    ]


def drive(engine: TorchEngine, batches: Iterator[TokenBatch]) -> Iterator[int]:
    """Run batches as a worker does, as many in flight as the engine wants; yields the tokens of each that is back."""
    with ThreadPoolExecutor(engine.in_flight) as pool:
        flying: deque[tuple[int, Future[Any]]] = deque()
        for batch in batches:
            flying.append((len(batch.ids), pool.submit(engine.embed, batch)))
            if len(flying) >= engine.in_flight:
                count, future = flying.popleft()
                future.result()
                yield count
        for count, future in flying:
            future.result()
            yield count


def engine_rate(engine: TorchEngine, tokens: Tokens, work: Work, seconds: float) -> Rate:
    """The engine alone on token ids, for about so many seconds, after a warm-up."""
    info = engine.info
    cuts = windows_of(tokens, info.batch_tokens, info.padded)
    engine.warm_up(info.batch_tokens)
    for _ in drive(engine, (gather_batch(tokens, rows, 0, "document") for rows in cuts[:4])):
        pass
    end, started = time.perf_counter() + seconds, list[npt.NDArray[np.int64]]()

    def batches() -> Iterator[TokenBatch]:
        for rows in itertools.cycle(cuts):
            if started and time.perf_counter() > end:
                return
            started.append(rows)
            yield gather_batch(tokens, rows, 0, "document")

    begun = time.perf_counter()
    done = sum(drive(engine, batches()))
    taken = time.perf_counter() - begun
    lengths = [tokens.lengths[rows] for rows in started]
    computed = sum(int(some.max()) * len(some) if info.padded else int(some.sum()) for some in lengths)
    return Rate(done / taken, sum(map(work.flops, lengths)) / taken, 1 - done / computed)


def busy_share(engine: TorchEngine, tokens: Tokens) -> float:
    """Share of the time in which at least one kernel ran on the device, over some batches, copies not counted."""
    cuts = windows_of(tokens, engine.info.batch_tokens, engine.info.padded)[:_PROFILED_BATCHES]
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in drive(engine, (gather_batch(tokens, rows, 0, "document") for rows in cuts)):
            pass
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    )
    busy, begun = 0.0, float(ranges[0][0])
    until = begun
    for start, stop in ranges:
        busy += max(0.0, stop - max(start, until))
        until = max(until, float(stop))
    return busy / (until - begun)


def synchronizations(engine: TorchEngine, tokens: Tokens) -> str:
    """Whether a batch makes the host wait for the device before its own result is there: "none", or what did."""
    rows = windows_of(tokens, engine.info.batch_tokens, engine.info.padded)[0]
    batch = gather_batch(tokens, rows, 0, "document")
    engine.embed(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.embed(batch)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def encode_rate(
    folder: Path, device: torch.device, texts: Sequence[str], work: Work, seconds: float, dtype: str, batch_size: int
) -> Rate:
    """`SentenceTransformer.encode`, tokenizing included as it cannot be had without."""
    model = load(folder, device, dtype)
    some = list(texts[: 2 * batch_size])
    encode = functools.partial(model.encode, batch_size=batch_size, show_progress_bar=False)
    encode(some)
    begun = time.perf_counter()
    encode(some)
    count = int(len(some) * seconds / (time.perf_counter() - begun))
    chosen = list(itertools.islice(itertools.cycle(texts), max(batch_size, min(count, 8 * len(texts)))))
    begun = time.perf_counter()
    encode(chosen)
    taken = time.perf_counter() - begun
    lengths = np.array([len(ids) for ids in model.tokenizer(chosen, truncation=True)["input_ids"]])
    by_characters = np.argsort([-len(text) for text in chosen], kind="stable")  # as `encode` sorts
    padded = sum(
        int(lengths[rows].max()) * len(rows)
        for rows in (by_characters[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    )
    return Rate(float(lengths.sum()) / taken, work.flops(lengths) / taken, 1 - float(lengths.sum()) / padded)


def load(folder: Path, device: torch.device, dtype: str) -> SentenceTransformer:
    return SentenceTransformer(
        str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
    )


def lowest_cosine(engine: TorchEngine, tokens: Tokens, reference: SentenceTransformer, texts: Sequence[str]) -> float:
    """Of the engine's vectors to those of `encode` in float32, over the first texts."""
    rows = np.arange(len(texts))
    ours = engine.embed(gather_batch(tokens, rows, 0, "document"))["embedding"]
    theirs = reference.encode(list(texts), batch_size=32)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())
