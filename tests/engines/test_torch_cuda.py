"""The torch engine on a real GPU; skipped only where torch sees none.

`pytest tests/engines/test_torch_cuda.py`, from the project's root, needs neither Redis nor its client. The real model
comes from an installed package, or is the folder that EMBEDSTREAM_TEST_MODEL names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engines.embedding import MINILM, embed, load_reference, lowest_cosine
from engines.model_shapes import (
    SHAPES,
    Shape,
    decoder,
    modernbert,
    mpnet,
    plain_transformers,
    python_tokenizer,
    static_embedding,
)

from embedstream_worker.batching import gather_batch
from embedstream_worker.engines.attention_check import check_attention
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.packed_attention import Asked
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.models import resolve_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POOLING_WAITS = {"bert_weightedmean", "xlm_roberta"}
"""Shapes with a weighted mean, for which sentence-transformers' own pooling waits."""


def started(path: Path | str, compiles: bool = False) -> TorchEngine:
    return TorchEngine(resolve_model(str(path)), "cuda:0", compiles=compiles)


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


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_vectors_of_a_real_model_equal_sentence_transformers(
    compiles: bool, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "embedstream_worker")
    engine = started(MINILM, compiles)
    assert ("packed without padding, compiled" in caplog.text) == compiles, caplog.text
    together = embed(engine, texts, budget=16_384)
    reference = load_reference(resolve_model(MINILM).path)
    assert lowest_cosine(together, reference.encode_document(texts)) >= 0.999
    alone = embed(engine, texts[:40], budget=1)
    assert lowest_cosine(alone, together[:40]) >= 0.999
    engine.close()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (64, 64), (63, 0), (4095, 0)])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(12, 12, 32), (12, 12, 64), (16, 8, 128)])
def test_attention_at_once_is_attention_text_by_text(
    heads: int, key_heads: int, head_dim: int, window: tuple[int, int]
) -> None:
    check_attention([Asked(heads, key_heads, head_dim, None, window)], 8192, torch.device("cuda:0"))


@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape not in (mpnet, static_embedding)], ids=lambda shape: shape.__name__
)
def test_a_batch_waits_for_the_device_only_for_its_own_result(
    shape: Shape, folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    if shape.__name__ in POOLING_WAITS:
        pytest.skip("its pooling waits")
    engine = started(folder(shape))
    batch = whole(engine, texts[:64])
    for _ in range(engine.in_flight):
        engine.run(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()


def test_threads_that_embed_at_once_get_the_vectors_of_one_alone(
    folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine = started(folder(plain_transformers))
    pieces = [whole(engine, texts[start : start + 1 + start % 37]) for start in range(0, 180, 3)]
    alone = [engine.run(piece)["dense"] for piece in pieces]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda piece: engine.run(piece)["dense"], pieces))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [plain_transformers, modernbert, decoder], ids=lambda shape: shape.__name__)
def test_compiled_blocks_give_the_same_vectors(
    shape: Shape, folder: Callable[[Shape], Path], texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain, engine = started(folder(shape)), started(folder(shape), compiles=True)
    assert "runs eagerly" not in caplog.text
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(embed, engine, texts).result()
    assert lowest_cosine(ours, embed(plain, texts)) >= 0.999
    engine.close()
    plain.close()


def test_a_closed_engine_gives_its_memory_back(folder: Callable[[Shape], Path], texts: list[str]) -> None:
    folder(python_tokenizer)  # the largest table of these
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = started(folder(python_tokenizer))
    embed(engine, texts[:9])
    assert torch.cuda.memory_allocated() > before
    engine.close()
    assert torch.cuda.memory_allocated() <= before


def test_the_budget_is_found_by_trial(folder: Callable[[Shape], Path]) -> None:
    engine = started(folder(plain_transformers))
    assert engine.in_flight == 3
    assert engine.info.batch_tokens >= 8192
    engine.warm_up(engine.info.batch_tokens)
