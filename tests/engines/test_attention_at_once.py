"""The GPU's way through a model, run on a CPU: attention takes all texts at once, and nothing waits for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from engines.cpu_attention import Kernel, packed_at_once, right
from engines.embedding import embed, lowest_cosine
from engines.model_shapes import (
    SHAPES,
    Shape,
    bert_mean_without_prompt,
    decoder,
    modernbert,
    mpnet,
    plain_transformers,
    static_embedding,
)
from torch.utils._python_dispatch import TorchDispatchMode

from embedstream_worker.batching import gather_batch
from embedstream_worker.engines import attention_check, packed_attention
from embedstream_worker.engines.attention_check import check_attention
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.checking import CheckFailed
from embedstream_worker.engines.packed_attention import Asked
from embedstream_worker.engines.packed_batch import TOKENS_STEP, bound, fill_up
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.models import resolve_model

CPU = torch.device("cpu")
WINDOWS = [(-1, -1), (-1, 0), (8, 8), (64, 64), (63, 0)]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with packed_at_once(monkeypatch):
        yield


def started(path: Path, dtype: Dtype = "bfloat16") -> TorchEngine:
    return TorchEngine(resolve_model(str(path)), "cpu", dtype, "packed")


def whole(engine: TorchEngine, texts: list[str], prompt_length: int = 0) -> TokenBatch:
    tokens = engine.tokenizer().encode(texts, engine.info.max_length)
    return gather_batch(tokens, np.arange(len(texts)), prompt_length, "document")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("shape", [modernbert, decoder, plain_transformers], ids=lambda s: s.__name__)
def test_vectors_are_those_of_padded_float32(shape: Shape, folder: Callable[[Shape], Path], texts: list[str]) -> None:
    engine = started(folder(shape))
    exact = TorchEngine(resolve_model(str(folder(shape))), "cpu", "float32", "padded")
    assert (engine.info.dtype, engine.info.padded) == ("bfloat16", False)
    some = texts[:24] + texts[-2:]
    assert lowest_cosine(embed(engine, some), embed(exact, some)) >= 0.999


def narrower(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: tuple[int, int]) -> torch.Tensor:
    return right(q, k, v, starts, scale, (window[0] - 1, window[1]))


def wider(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: tuple[int, int]) -> torch.Tensor:
    return right(q, k, v, starts, scale, (window[0], window[1] + 1))


def shifted(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: tuple[int, int]) -> torch.Tensor:
    return right(q, k, v, starts, scale, (window[0] - 1, window[1] + 1))


def leaking(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    return right(q, k, v, [starts[0], starts[-1]], scale, window)


def softer(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    return right(q, k, v, starts, scale * 0.9, window)


def losing_the_128th(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    output = right(q, k, v, starts, scale, window)
    for start, stop in itertools.pairwise(starts):
        output[start + 127 : min(start + 128, stop)] = 0
    return output


def not_finite(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    output = right(q, k, v, starts, scale, window)
    output[-1] = torch.nan
    return output


def swapping_key_heads(q: Any, k: Any, v: Any, starts: Any, scale: Any, window: Any) -> torch.Tensor:
    return right(q, k.flip(1), v.flip(1), starts, scale, window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (1, 1)])
def test_attention_that_is_right_passes_the_check(heads: tuple[int, int], window: tuple[int, int]) -> None:
    check_attention([Asked(*heads, 16, None, window), Asked(*heads, 8, 0.3, window)], 300, CPU)


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        (narrower, (8, 8)),
        (narrower, (256, 256)),
        (wider, (63, 0)),
        (wider, (256, 256)),
        (shifted, (64, 64)),
        (leaking, (-1, -1)),
        (softer, (-1, -1)),
        (losing_the_128th, (-1, 0)),
        (not_finite, (-1, -1)),
        (swapping_key_heads, (-1, -1)),
    ],
)
def test_attention_that_is_a_little_wrong_fails_the_check(
    kernel: Kernel, window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with packed_at_once(monkeypatch, kernel), pytest.raises(CheckFailed, match="over packed texts in bfloat16 is"):
        check_attention([Asked(4, 2, 16, None, window)], 512, CPU)


def test_long_texts_are_checked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "_QUERIES_AT_ONCE", 50)
    check_attention([Asked(4, 2, 16, None, (8, 8)), Asked(4, 4, 16, None, (-1, 0))], 160, CPU)


def test_a_model_whose_attention_is_wrong_runs_padded_and_says_so_in_one_line(
    folder: Callable[[Shape], Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exact = TorchEngine(resolve_model(str(folder(modernbert))), "cpu", "float32", "padded")
    with packed_at_once(monkeypatch, narrower):
        engine = started(folder(modernbert))
        assert engine.info.padded
        assert lowest_cosine(embed(engine, texts[:9]), embed(exact, texts[:9])) >= 0.999
    [line] = [record.getMessage() for record in caplog.records]
    assert "runs in padded batches, as packed ones fail: its attention over packed texts in bfloat16 is" in line
    assert "window=(8, 8)" in line


@pytest.mark.usefixtures("at_once")
def test_a_torch_whose_attention_is_too_old_runs_padded_and_says_so(
    folder: Callable[[Shape], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_attention, "_OPTIONS", frozenset({"is_causal"}))
    assert started(folder(plain_transformers)).info.padded
    assert "for packed texts; use 2.11 or newer" in caplog.text


def test_a_sentence_transformers_that_waits_in_its_pooling_runs_padded_and_says_so(
    folder: Callable[[Shape], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sentence_transformers, "__version__", "6.1.0")
    assert started(folder(plain_transformers), "float32").info.padded
    assert "sentence-transformers 6.1.0 pools such batches too slowly; use 6.2 or newer" in caplog.text


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at whatever needs values of the device before the host can go on."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "bincount", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options, name = kwargs or {}, func.overloadpacket.__name__
        waits = name.lstrip("_").startswith(tuple(wait.lstrip("_") for wait in self.WAITS))
        waits |= name == "repeat_interleave" and options.get("output_size") is None
        waits |= name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert not waits, f"{func} waits for the device"
        return func(*args, **options)


POOLING_WAITS = {"bert_weightedmean", "xlm_roberta"}
"""Shapes with a weighted mean: sentence-transformers' own pooling repeats offsets without telling how many."""


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape not in (mpnet, static_embedding)], ids=lambda shape: shape.__name__
)
def test_a_packed_batch_waits_for_nothing(shape: Shape, folder: Callable[[Shape], Path], texts: list[str]) -> None:
    engine = started(folder(shape))
    assert not engine.info.padded
    batch = whole(engine, texts[:20])
    ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(batch.offsets.astype(np.int32))
    with NoWaits():  # type: ignore[no-untyped-call]
        if shape.__name__ in POOLING_WAITS:
            with pytest.raises(AssertionError, match="repeat_interleave"):
                engine._forward(batch, ids, starts)
        else:
            engine._forward(batch, ids, starts)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_what_waits_is_found_out(mode: Callable[[], AbstractContextManager[None]]) -> None:
    numbers = torch.arange(5)
    for wait in (
        lambda: numbers.max().item(),
        lambda: numbers[numbers > 2],
        lambda: torch.unique(numbers),
        lambda: numbers.bincount(),
        lambda: numbers.repeat_interleave(numbers),
        lambda: bool(numbers.sum() > 1),
    ):
        with (
            mode(),
            NoWaits(),  # type: ignore[no-untyped-call]
            pytest.raises(AssertionError, match="waits for the device"),
        ):
            wait()


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4], [511], [512], [513], [100] * 9, [2000, 7]])
@pytest.mark.parametrize("longest", [5, 100, 4096])
def test_batches_are_filled_up_with_texts_that_the_model_can_place(lengths: list[int], longest: int) -> None:
    offsets = np.cumsum([0, *lengths])
    batch = TokenBatch(np.arange(offsets[-1], dtype=np.int32), offsets, max(lengths), 0, "document")
    full = fill_up(batch, TOKENS_STEP, longest)
    assert len(full.ids) % TOKENS_STEP == 0
    assert len(full.ids) - len(batch.ids) < TOKENS_STEP
    assert full.offsets[-1] == len(full.ids)
    assert full.lengths.min() > 0
    assert full.lengths[len(batch) :].max(initial=0) <= longest
    assert full.longest == full.lengths.max()
    np.testing.assert_array_equal(full.ids[: len(batch.ids)], batch.ids)
    np.testing.assert_array_equal(full.offsets[: len(batch) + 1], batch.offsets)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("shape", [decoder, bert_mean_without_prompt], ids=lambda shape: shape.__name__)
def test_texts_that_fill_a_batch_up_change_no_vector(
    shape: Shape, folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine = started(folder(shape))
    batch = whole(engine, texts[:20], prompt_length=2)
    together = engine.run(batch)["dense"]
    assert together.shape[0] == 20
    for row in (0, 7, 19):
        alone = engine.run(whole(engine, texts[row : row + 1], prompt_length=2))["dense"]
        if np.isfinite(alone).all():  # "a" is nothing but the prompt
            assert lowest_cosine(alone, together[row : row + 1]) >= 0.999


def test_few_bounds_of_length_reach_the_kernels() -> None:
    bounds = {bound(longest) for longest in range(1, 513)}
    assert bounds == {64, 128, 256, 512}
    assert all(bound(longest) >= longest for longest in range(1, 5000))


@pytest.mark.usefixtures("at_once")
def test_only_the_text_without_tokens_gets_no_vector(folder: Callable[[Shape], Path]) -> None:
    engine = started(folder(plain_transformers), "float32")
    ids = np.full(5, 7, np.int32)
    some = engine.run(TokenBatch(ids, np.array([0, 0, 3, 3, 5, 5]), 3, 0, "document"))["dense"]
    assert np.isnan(some).all(axis=1).tolist() == [True, False, True, False, True]
    full = engine.run(TokenBatch(ids, np.array([0, 3, 5]), 3, 0, "document"))["dense"]
    np.testing.assert_array_equal(some[[1, 3]], full)
    with pytest.raises(ValueError, match="the text has no token"):
        engine.run_exact(TokenBatch(ids[:0], np.array([0, 0]), 0, 0, "document"))
