"""The stage `kinds`: models that give something else than one vector for each text, in packed and in padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embedstream_worker.engines.base import Tokens
from embedstream_worker.engines.headed_engine import HeadedEngine
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.torch_engine import Batches
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model
from gpu_stages import material
from gpu_stages.context import Bench
from gpu_stages.material import LONGEST
from gpu_stages.measuring import rate, warnings_said
from gpu_stages.models import USUAL

_TOKENS = 1_000_000
_MODELS: dict[str, Callable[[Bench], Path]] = {
    "SPLADE": material.random_splade,
    "reranker": material.random_reranker,
    "BGE-M3's three": material.random_three,
}


def measure(bench: Bench) -> None:
    """Each of BERT-base's size. That one runs otherwise than wanted is in what it `said`."""
    text = material.RealText(bench)
    texts = text.cut(material.lognormal_lengths(8_000 if bench.tiny else _TOKENS))
    for name, make in _MODELS.items():
        with bench.part(name):
            folder = make(bench)
            for batches in ("packed", "padded"):
                if bench.packs or batches == "padded":
                    with bench.part(f"{name}, {batches}"):
                        _measure(bench, name, folder, batches, texts)


def _measure(bench: Bench, name: str, folder: Path, batches: Batches, texts: list[str]) -> None:
    dtype: Dtype = "auto" if bench.on_gpu else "float32"
    begun = time.perf_counter()
    with warnings_said() as said:
        engine = HeadedEngine(resolve_model(str(folder), trust=Trust(pickle=True)), str(bench.device), dtype, batches)
    found: dict[str, Any] = {
        "seconds_to_start": round(time.perf_counter() - begun, 1),
        "ran": f"{'packed' if engine.packed else 'padded'}, {engine.info.dtype}",
    }
    if said:
        found["said"] = "; ".join(said)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found |= rate(engine, _tokens(engine, texts), material.work_of(engine.modules), bench.seconds)
    del found["tflops"]  # heads are not counted
    if bench.on_gpu:
        found["peak_memory_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    bench.note(f"{name}, {batches}", model=name, form=batches, corpus=USUAL, **found)
    engine.close()


def _tokens(engine: HeadedEngine, texts: list[str]) -> Tokens:
    longest = min(LONGEST, engine.info.max_length)
    if not engine.info.pairs:
        return engine.tokenizer().encode(texts, longest)
    half = len(texts) // 2
    return engine.tokenizer().encode(texts[:half], longest, texts[half : 2 * half])
