"""Packed batches on a real GPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.embedding import MINILM, embed, load_reference, lowest_cosine
from engines.model_shapes import (
    SHAPES,
    Shape,
    modernbert,
    mpnet,
    plain_transformers,
    python_tokenizer,
    static_embedding,
)

from embedstream_worker.batching import gather_batch
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.packed_attention import attend
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.models import resolve_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[[Shape], Path]:
    def make(shape: Shape) -> Path:
        return shape(tmp_path_factory.mktemp("shape"), resolve_model(MINILM).path, texts)

    return make


def started(path: Path) -> TorchEngine:
    engine = TorchEngine(resolve_model(str(path)), "cuda:0")
    engine.start()
    return engine


def whole(engine: TorchEngine, texts: list[str]) -> TokenBatch:
    tokens = engine.tokenizer().encode(texts, engine.info.max_length)
    return gather_batch(tokens, np.arange(len(texts)), 0, "document")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_vectors_equal_sentence_transformers(shape: Shape, folder: Callable[[Shape], Path], texts: list[str]) -> None:
    path = folder(shape)
    engine, some = started(path), texts[:40] + texts[-4:]
    assert engine.info.padded == (shape is mpnet) or shape is python_tokenizer
    assert engine.info.dtype == ("float32" if shape is static_embedding else "bfloat16")
    assert lowest_cosine(embed(engine, some), load_reference(path).encode_document(some)) >= 0.999
    engine.close()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_at_once_is_attention_text_by_text(causal: bool, window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [5, 1, 170, 2, 64]
    starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
    )
    module = torch.nn.Module()
    options: dict[str, Any] = {"is_causal": causal, "cu_seq_lens_q": starts, "max_length_q": max(lengths)}
    fast, _ = attend(module, query, key, value, None, 0.2, window, **options)
    slow, _ = attend(module, query.float(), key.float(), value.float(), None, 0.2, window, **options)
    assert (fast.float() - slow).norm() / slow.norm() < 1e-2


def test_a_batch_waits_for_the_device_only_for_its_own_result(
    folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine = started(folder(modernbert))
    batch = whole(engine, texts[:64])
    for _ in range(engine.in_flight):
        engine.embed(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.embed(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_that_embed_at_once_get_the_vectors_of_one_alone(
    folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine = started(folder(plain_transformers))
    pieces = [whole(engine, texts[start : start + 1 + start % 37]) for start in range(0, 400, 7)]
    alone = [engine.embed(piece)["embedding"] for piece in pieces]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda piece: engine.embed(piece)["embedding"], pieces))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_the_budget_is_found_by_trial(folder: Callable[[Shape], Path]) -> None:
    engine = started(folder(plain_transformers))
    assert engine.in_flight == 2
    assert engine.info.batch_tokens >= 8192
    engine.warm_up(engine.info.batch_tokens)
