"""Every engine that runs here gives sentence-transformers' own vectors, for model folders of every kind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from engines.embedding import Vectors, embed, load_reference, lowest_cosine
from engines.model_shapes import (
    SHAPES,
    Shape,
    bert_mean_without_prompt,
    decoder,
    python_tokenizer,
    static_embedding,
)

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Engine, Role
from embedstream_worker.engines.fastest import load_fastest
from embedstream_worker.engines.onnx_engine import OnnxEngine
from embedstream_worker.engines.openvino_cache import Cache, NotConvertible
from embedstream_worker.engines.openvino_engine import OpenVinoEngine
from embedstream_worker.engines.openvino_trial import EngineUnfit, load_openvino
from embedstream_worker.engines.precision import Precision
from embedstream_worker.engines.torch_engine import TorchEngine
from embedstream_worker.fingerprint import folder_fingerprint
from embedstream_worker.models import ModelFolder, resolve_model

LOWEST: dict[Precision, float] = {"float32": 0.99999, "bfloat16": 0.999}
MAY_NOT_CONVERT = {decoder, python_tokenizer, static_embedding}
ROLES: tuple[Role, Role] = ("document", "query")


@dataclass(frozen=True)
class Sample:
    """A model folder, some texts, and their vectors as sentence-transformers makes them."""

    folder: ModelFolder
    texts: list[str]
    vectors: dict[Role, Vectors]


@pytest.fixture(scope="module")
def sample(folder: Callable[[Shape], Path], texts: list[str]) -> Callable[[Shape], Sample]:
    @functools.cache
    def make(shape: Shape) -> Sample:
        reference = load_reference(folder(shape))
        some = texts[:40] + texts[-4:]
        vectors = {"document": reference.encode_document(some), "query": reference.encode_query(some)}
        return Sample(resolve_model(str(folder(shape))), some, vectors)  # type: ignore[arg-type]

    return make


def assert_same_vectors(engine: Engine, sample: Sample, lowest: float, tolerance: float) -> None:
    output = engine.info.outputs["dense"]
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


def started(engine_name: str, folder: ModelFolder, dtype: Precision, shape: Shape) -> Engine:
    """Raises `NotConvertible` or `EngineUnfit` for a model that the engine refuses."""
    if engine_name == "torch":
        return TorchEngine(folder, "cpu", dtype)
    if engine_name == "onnxruntime":
        try:
            return OnnxEngine(folder, "cpu", dtype)
        except ModelError as error:
            raise NotConvertible(str(error)) from error
    if shape is decoder:  # compiling this one may end the process: with a trial
        return load_openvino(folder, dtype)
    # Without, as each trial loads torch anew.
    return OpenVinoEngine(folder, dtype, folder_fingerprint(folder.path), Cache())


@pytest.mark.holds("Right", "infinity#42", "omlx#2594")
@pytest.mark.parametrize(
    ("engine_name", "dtype"),
    [*product(["torch", "openvino"], ["float32", "bfloat16"]), ("onnxruntime", "float32")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_vectors_equal_sentence_transformers(
    shape: Shape, engine_name: str, dtype: Precision, sample: Callable[[Shape], Sample]
) -> None:
    made = sample(shape)
    try:
        engine = started(engine_name, made.folder, dtype, shape)
    except (EngineUnfit, NotConvertible):
        assert shape in MAY_NOT_CONVERT
        return
    # A table of vectors has no transformer that could compute in less.
    assert engine.info.dtype == (dtype if shape is not static_embedding else "float32")
    assert_same_vectors(engine, made, LOWEST[dtype], tolerance=1e-5 if engine.info.dtype == "float32" else 5e-2)
    engine.close()


@pytest.mark.parametrize(
    "shape", [bert_mean_without_prompt, decoder, static_embedding], ids=lambda shape: shape.__name__
)
def test_the_engine_that_is_chosen_by_itself_is_right_and_says_why_it_was(
    shape: Shape, sample: Callable[[Shape], Sample], caplog: pytest.LogCaptureFixture
) -> None:
    made = sample(shape)
    with caplog.at_level(logging.INFO):
        engine = load_fastest(made.folder, "cpu")
    info = engine.info
    assert info.engine == "openvino" or shape in MAY_NOT_CONVERT
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("engine ")]
    assert line.startswith(f"engine {info.engine} {info.dtype} on cpu: ")
    assert ("fastest here" if info.engine == "openvino" else "openvino does not run model") in line
    assert_same_vectors(engine, made, LOWEST["bfloat16"], tolerance=5e-2)
    engine.close()
