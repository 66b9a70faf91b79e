"""Compiled blocks, with the compiler's front half alone: it decides what is compiled, and for which shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines.cpu_attention import packed_at_once
from engines.embedding import embed
from engines.model_shapes import Shape, decoder, modernbert, plain_transformers, static_embedding
from torch._dynamo.utils import counters

from embedstream.errors import ModelError
from embedstream_worker.engines import EngineOptions, compiling, fusing, load_engine
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.torch_engine import Batches, TorchEngine
from embedstream_worker.models import resolve_model


@pytest.fixture(autouse=True)
def _front_half(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with packed_at_once(monkeypatch):
        yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def started(path: Path, compiles: bool = True, batches: Batches = "packed") -> TorchEngine:
    return TorchEngine(resolve_model(str(path)), "cpu", "float32", batches, compiles)


def random_batches(count: int) -> list[TokenBatch]:
    random = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        lengths = random.integers(1, random.integers(3, 100), random.integers(2, 40))
        ids = random.integers(0, 500, lengths.sum()).astype(np.int32)
        batches.append(TokenBatch(ids, np.cumsum([0, *lengths]), int(lengths.max()), 0, "document"))
    return batches


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Torch's own loggers aside."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("embedstream")]


def vectors_of(engine: TorchEngine, batches: list[TokenBatch]) -> list[npt.NDArray[np.float32]]:
    """From a thread as the worker has for its batches."""
    with ThreadPoolExecutor(1) as pool:
        return [*pool.map(lambda batch: engine.run(batch)["dense"], batches)]


@pytest.mark.parametrize("shape", [plain_transformers, modernbert, decoder], ids=lambda shape: shape.__name__)
def test_one_compilation_serves_every_shape(
    shape: Shape, folder: Callable[[Shape], Path], caplog: pytest.LogCaptureFixture
) -> None:
    batches = random_batches(30)
    expected = vectors_of(started(folder(shape), compiles=False), batches)
    engine = started(folder(shape))
    assert not said(caplog)
    torch.compiler.set_stance("fail_on_recompile")
    for ours, theirs in zip(vectors_of(engine, batches), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    engine.close()


def test_after_the_start_nothing_is_compiled_in_any_thread(folder: Callable[[Shape], Path]) -> None:
    [batch] = random_batches(1)
    one_token = TokenBatch(np.array([7], np.int32), np.array([0, 1]), 1, 0, "document")  # a size compiled on its own
    expected = vectors_of(started(folder(plain_transformers), compiles=False), [one_token])
    engine = started(folder(plain_transformers))
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    vectors_of(engine, [batch])
    [ours] = vectors_of(engine, [one_token])
    assert counters["stats"]["unique_graphs"] == compiled
    np.testing.assert_allclose(ours, expected[0], rtol=0, atol=1e-5)
    engine.close()


def test_a_model_that_cannot_be_compiled_runs_as_it_was_and_says_so_in_one_line(
    folder: Callable[[Shape], Path],
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = started(folder(plain_transformers), compiles=False)
    monkeypatch.setattr(compiling, "BACKEND", lambda _graph, _inputs: 1 / 0)
    engine = started(folder(plain_transformers))
    [line] = said(caplog)
    assert "runs eagerly, as it cannot be compiled: " in line
    assert "division by zero" in line
    np.testing.assert_array_equal(embed(engine, texts[:9]), embed(plain, texts[:9]))
    assert [*engine.modules.state_dict()] == [*plain.modules.state_dict()]


def test_compiled_code_that_changes_vectors_is_not_used(
    folder: Callable[[Shape], Path],
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = started(folder(plain_transformers), compiles=False)
    monkeypatch.setattr(fusing._DenseGelu, "forward", lambda self, states: torch.nn.functional.linear(
        states, self.weight, self.bias
    ))  # fmt: skip
    engine = started(folder(plain_transformers))
    assert "cannot be compiled: CheckFailed: its vectors in float32 have cosine" in caplog.text
    np.testing.assert_array_equal(embed(engine, texts[:9]), embed(plain, texts[:9]))


@pytest.mark.parametrize(("shape", "batches"), [(plain_transformers, "padded"), (static_embedding, "packed")])
def test_padded_batches_are_not_compiled_and_that_is_said(
    shape: Shape, batches: Batches, folder: Callable[[Shape], Path], caplog: pytest.LogCaptureFixture
) -> None:
    started(folder(shape), batches=batches)
    assert "runs eagerly, as only packed batches are compiled" in caplog.text


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "hashing"])
def test_an_engine_that_does_not_take_it_refuses(engine: str) -> None:
    with pytest.raises(ModelError, match=f"--compile: --engine {engine} does not take it; use --engine torch"):
        load_engine(EngineOptions("hashing", engine=engine, compiles=True))
