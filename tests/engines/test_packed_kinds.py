"""Models with heads in packed batches: on the CPU, where attention goes text by text, or at once by the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.cpu_attention import packed_at_once, right
from engines.kinds import bge_m3, classifier, colbert, inference_free, reranker, splade, stanford
from engines.model_shapes import Shape

from embedstream.dataset.values import Ragged, Values
from embedstream_worker.engines.base import Results, TokenBatch
from embedstream_worker.engines.checking import difference
from embedstream_worker.engines.headed_engine import HeadedEngine
from embedstream_worker.engines.packed_batch import TOKENS_STEP
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.torch_engine import Batches
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model

Folder = Callable[[Shape], Path]

KINDS = [splade, inference_free, colbert, stanford, bge_m3, reranker, classifier]


def started(path: Path, batches: Batches = "packed", dtype: Dtype = "float32") -> HeadedEngine:
    return HeadedEngine(resolve_model(str(path), trust=Trust(pickle=True)), "cpu", dtype, batches)


def batch_of(engine: HeadedEngine, texts: list[str], firsts: list[str] | None = None) -> TokenBatch:
    tokens = engine.tokenizer().encode(texts, engine.info.max_length, firsts)
    return TokenBatch(tokens.ids, tokens.offsets, int(tokens.lengths.max()), 0, "document", tokens.types)


def off(ours: Results, theirs: Results) -> dict[str, float]:
    """The greatest difference of each kind, as a share of the greatest number if that is above 1."""

    def numbers(values: Values) -> Any:
        return values.values if isinstance(values, Ragged) else values

    return {
        kind: difference(ours[kind], values) / float(np.abs(numbers(values)).max(initial=1.0))  # type: ignore[literal-required, arg-type]
        for kind, values in theirs.items()
    }


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: shape.__name__)
def test_results_of_packed_batches_are_those_of_padded_ones(shape: Shape, folder: Folder, texts: list[str]) -> None:
    packed, padded = started(folder(shape)), started(folder(shape), "padded")
    assert packed.packed
    assert not padded.packed
    some = [*texts[:20], "a", *texts[-3:]]
    batches = [batch_of(packed, some), batch_of(packed, some[:1])]
    if packed.info.pairs:
        batches.append(batch_of(packed, some, some[::-1]))
    for batch in batches:
        found = off(packed.run(batch), padded.run(batch))
        assert set(found) == set(packed.info.outputs)
        assert max(found.values()) <= 1e-5, found
    if shape in (splade, colbert):
        query = off(packed.query(some[0], None), padded.query(some[0], None))
        assert max(query.values()) == 0
        assert packed.packed
    assert packed.info.padded, "heads compute paddings, too: batches are cut as for padded ones"


def test_texts_do_not_see_each_other(folder: Folder, texts: list[str]) -> None:
    engine = started(folder(bge_m3))
    together = engine.run(batch_of(engine, texts[:4]))["multivector"]
    alone = [engine.run(batch_of(engine, [text]))["multivector"] for text in texts[:4]]
    whole = Ragged(np.concatenate([one.counts for one in alone]), np.concatenate([one.values for one in alone]))
    assert difference(together, whole) <= 1e-5


def test_a_text_without_tokens_costs_only_itself(folder: Folder, texts: list[str]) -> None:
    engine = started(folder(classifier))
    two = batch_of(engine, texts[:2])
    three = replace(two, offsets=np.insert(two.offsets, 1, two.offsets[1]))
    labels = engine.run(three)["labels"]
    assert np.isnan(labels[1]).all()
    np.testing.assert_allclose(labels[[0, 2]], engine.run(two)["labels"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no token"):
        engine.run(TokenBatch(np.zeros(0, np.int32), np.zeros(2, np.int64), 0, 0, "document"))


@pytest.mark.parametrize("shape", [splade, reranker], ids=lambda shape: shape.__name__)
def test_in_bfloat16_all_texts_go_at_once_and_results_are_near(
    shape: Shape, folder: Folder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = set()

    def counting(query: torch.Tensor, *others: Any) -> torch.Tensor:
        totals.add(len(query))
        return right(query, *others)

    padded = started(folder(shape), "padded")
    with packed_at_once(monkeypatch, counting):
        engine = started(folder(shape), dtype="bfloat16")
        assert (engine.packed, engine.info.dtype) == (True, "bfloat16")
        totals.clear()
        batch = batch_of(engine, texts[:9], texts[9:18] if engine.info.pairs else None)
        found = off(engine.run(batch), padded.run(batch))
        assert {total % TOKENS_STEP for total in totals} == {0}
    assert max(found.values()) <= 0.1, found


def leaking(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    return right(q, k, v, [starts[0], starts[-1]], scale, window)


def test_attention_that_is_wrong_is_found_at_load(
    folder: Folder, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    padded = started(folder(reranker), "padded")
    batch = batch_of(padded, texts[:5], texts[5:10])
    with packed_at_once(monkeypatch, leaking):
        engine = started(folder(reranker))
        assert not engine.packed
        assert off(engine.run(batch), padded.run(batch))["score"] <= 1e-5
    assert "runs in padded batches, as it cannot be packed: its score results in float32 are off by" in caplog.text
