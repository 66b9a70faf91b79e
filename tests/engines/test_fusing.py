"""Fewer kernels, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from engines.embedding import load_reference
from engines.model_shapes import (
    SHAPES,
    Shape,
    decoder,
    distilbert,
    modernbert,
    mpnet,
    nearly_equal_vectors,
    plain_transformers,
    static_embedding,
    xlm_roberta,
)
from sentence_transformers import SentenceTransformer

from embedstream_worker.engines.fusing import fuse_gelu, fuse_projections

LAYERS = 2  # of the shapes with layers, but ModernBERT


def vectors(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    return model.encode_query(texts[:6] + texts[-1:], convert_to_tensor=True)


@pytest.mark.parametrize("shape", [*SHAPES, nearly_equal_vectors], ids=lambda shape: shape.__name__)
def test_fused_vectors_equal_the_models_own(shape: Shape, folder: Callable[[Shape], Path], texts: list[str]) -> None:
    model = load_reference(folder(shape))
    before, names = vectors(model, texts), list(model.state_dict())
    with ExitStack() as undo:
        products, activations = fuse_projections(model, undo), fuse_gelu(model, undo)
        after = vectors(model, texts)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max().clamp(min=1)))
    layers = {"router": 2 * LAYERS, "static_embedding": 0}.get(shape.__name__, LAYERS)
    assert products == (0 if shape in (modernbert, mpnet) else layers), "ModernBERT's is one already"
    assert activations == (0 if shape in (modernbert, decoder) else layers), "those of these two are gated"
    assert torch.equal(vectors(model, texts), before), "undone"
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("shape", [plain_transformers, distilbert, xlm_roberta, decoder], ids=lambda s: s.__name__)
def test_a_layers_three_products_become_one(shape: Shape, folder: Callable[[Shape], Path], texts: list[str]) -> None:
    model = load_reference(folder(shape))

    def products() -> int:
        with torch.profiler.profile() as profile:
            vectors(model, texts)
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::mm"))

    before = products()
    with ExitStack() as undo:
        fuse_projections(model, undo)
        assert before - products() == 2 * LAYERS


def test_a_model_without_layers_has_nothing_to_fuse(folder: Callable[[Shape], Path]) -> None:
    model = load_reference(folder(static_embedding))
    with ExitStack() as undo:
        assert (fuse_projections(model, undo), fuse_gelu(model, undo)) == (0, 0)
