"""Every engine that runs here gives sentence-transformers' own vectors, for model folders of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from engines.embedding import MINILM, Vectors, embed, load_reference, lowest_cosine
from engines.model_shapes import SHAPES, Shape, decoder, python_tokenizer, static_embedding

from embedstream_worker.engines.auto_engine import AutoEngine
from embedstream_worker.engines.base import Engine, Role
from embedstream_worker.engines.openvino_engine import EngineUnfit, OpenVinoEngine
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.models import ModelFolder, resolve_model

ENGINES: dict[str, Callable[[ModelFolder, Dtype], Engine]] = {
    "torch": lambda folder, dtype: TorchEngine(folder, "cpu", dtype),
    "openvino": lambda folder, dtype: OpenVinoEngine(folder, dtype),
}
LOWEST: dict[Dtype, float] = {"float32": 0.99999, "bfloat16": 0.999}
MAY_NOT_CONVERT = {decoder, python_tokenizer, static_embedding}
ROLES: tuple[Role, Role] = ("document", "query")


@dataclass(frozen=True)
class Sample:
    """A model folder, some texts, and their vectors as sentence-transformers makes them."""

    folder: ModelFolder
    texts: list[str]
    vectors: dict[Role, Vectors]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[[Shape], Sample]:
    @functools.cache
    def make(shape: Shape) -> Sample:
        folder = shape(tmp_path_factory.mktemp("shape"), resolve_model(MINILM).path, texts)
        reference = load_reference(folder)
        some = texts[:40] + texts[-4:]
        vectors = {"document": reference.encode_document(some), "query": reference.encode_query(some)}
        return Sample(resolve_model(str(folder)), some, vectors)  # type: ignore[arg-type]

    return make


def assert_same_vectors(engine: Engine, sample: Sample, lowest: float, tolerance: float) -> None:
    output = engine.info.outputs["embedding"]
    for role in ROLES:
        ours, theirs = embed(engine, sample.texts, role), sample.vectors[role]
        if output.normalized:
            # What the model cuts to fewer dimensions has to be brought to length 1 again.
            np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
            theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        assert ours.shape == (len(theirs), output.dim) == theirs.shape
        assert lowest_cosine(ours, theirs) >= lowest
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine_name", list(ENGINES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_vectors_equal_sentence_transformers(
    shape: Shape, engine_name: str, dtype: Dtype, sample: Callable[[Shape], Sample]
) -> None:
    made = sample(shape)
    engine = ENGINES[engine_name](made.folder, dtype)
    try:
        engine.start()
    except EngineUnfit:
        assert shape in MAY_NOT_CONVERT
        return
    # Texts that are tables of vectors have no transformer to compute in less.
    assert engine.info.dtype == (dtype if shape is not static_embedding else "float32")
    assert_same_vectors(engine, made, LOWEST[dtype], tolerance=1e-5 if engine.info.dtype == "float32" else 5e-2)
    engine.close()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_the_engine_that_is_chosen_by_itself_is_right_for_every_model(
    shape: Shape, sample: Callable[[Shape], Sample]
) -> None:
    made = sample(shape)
    engine = AutoEngine(made.folder)
    engine.start()
    assert engine.info.engine == "openvino" or shape in MAY_NOT_CONVERT
    assert_same_vectors(engine, made, LOWEST["bfloat16"], tolerance=5e-2)
    engine.close()
