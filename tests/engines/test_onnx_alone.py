"""Folders that carry a graph for ONNX Runtime and no weights: what most export tools and many models on hubs leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines.carrying import carry
from engines.embedding import MINILM, embed, load_reference
from engines.kinds import classifier, cross_encoder, reranker
from engines.model_shapes import Shape, bert_cls, plain_transformers, truncated_dimensions
from sentence_transformers import CrossEncoder

from embedstream.errors import ModelError
from embedstream_worker.batching import gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine
from embedstream_worker.fingerprint import folder_fingerprint
from embedstream_worker.models import resolve_model

pytestmark = pytest.mark.filterwarnings("ignore")  # tracing and exporting warn of what is known

Made = Callable[..., Path]


@pytest.fixture
def alone(folder: Callable[[Shape], Path], tmp_path: Path) -> Made:
    """Makes a folder of a shape with a graph in the place of its weights."""

    def make(shape: Shape, output: str, name: str = "model.onnx") -> Path:
        path = shutil.copytree(folder(shape), tmp_path / "model")
        carry(path, path, output)
        (path / "onnx" / "model.onnx").rename(path / "onnx" / name)
        (path / "model.safetensors").unlink()
        return path

    return make


def scores(engine: Engine, firsts: list[str], texts: list[str]) -> Any:
    tokens = engine.tokenizer().encode(texts, engine.info.max_length, firsts)
    [found] = engine.run(gather_batch(tokens, np.arange(len(texts)), 0, "document")).values()
    return found


@pytest.mark.parametrize(
    ("shape", "output", "name"),
    [
        (plain_transformers, "last_hidden_state", "model.onnx"),
        (truncated_dimensions, "last_hidden_state", "model.onnx"),
        (bert_cls, "last_hidden_state", "model_quantized.onnx"),
        (bert_cls, "sentence_embedding", "model_qint8_avx512.onnx"),
    ],
)
def test_vectors_are_those_of_the_folder_that_the_graph_was_made_of(
    shape: Shape,
    output: str,
    name: str,
    alone: Made,
    folder: Callable[[Shape], Path],
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, some = alone(shape, output, name), [*texts[:20], *texts[-3:]]
    engine = load_engine(EngineOptions(str(path)))
    assert (engine.info.engine, engine.info.pairs) == ("onnxruntime", False)
    theirs = np.array(load_reference(folder(shape)).encode(some))
    if engine.info.outputs["dense"].normalized:  # what is cut, too
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(engine, some), theirs, rtol=0, atol=1e-5)
    [warning] = [record.getMessage() for record in caplog.records if "cannot be compared" in record.getMessage()]
    assert str(path / "onnx" / name) in warning


@pytest.mark.parametrize("shape", [reranker, cross_encoder, classifier])
def test_scores_and_labels_are_those_of_the_folder_that_the_graph_was_made_of(
    shape: Shape, alone: Made, folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    some, firsts = texts[:30], texts[30:60]
    engine = load_engine(EngineOptions(str(alone(shape, "logits"))))
    assert engine.info.pairs
    reference: Any = CrossEncoder(str(folder(shape)), device="cpu", local_files_only=True)
    theirs = reference.predict(list(zip(firsts, some, strict=True)), apply_softmax=shape is classifier)
    np.testing.assert_allclose(scores(engine, firsts, some), theirs.reshape(len(some), -1), rtol=0, atol=1e-4)


def test_another_graph_is_another_space(alone: Made) -> None:
    path = alone(bert_cls, "last_hidden_state")
    before = folder_fingerprint(path)
    (path / "onnx" / "model.onnx_data").write_bytes(b"other weights")
    assert folder_fingerprint(path) != before


def without_a_graph(path: Path) -> None:
    (path / "onnx" / "model.onnx").unlink()


def cut_off(path: Path) -> None:
    graph = path / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])


def of_another_task(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "modules.json").unlink()
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))


def with_another_pooling(path: Path) -> None:
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "weightedmean"}))


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (without_a_graph, r"model\.safetensors: missing; fetch the model again"),
        (cut_off, "its graph cannot be loaded"),
        (of_another_task, "gives last_hidden_state, which are no results of a CrossEncoder"),
        (with_another_pooling, r"its pooling \(weightedmean\) is not known without its weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_cannot_be_used_is_one_sentence(attack: Callable[[Path], None], says: str, alone: Made) -> None:
    path = alone(bert_cls, "last_hidden_state")
    attack(path)
    with pytest.raises(ModelError, match=says):
        load_engine(EngineOptions(str(path)))


def test_another_engine_is_refused_for_a_graph_alone(alone: Made) -> None:
    path = alone(bert_cls, "last_hidden_state")
    assert resolve_model(str(path)).graph == path / "onnx" / "model.onnx"
    assert resolve_model(MINILM).graph is None
    with pytest.raises(ModelError, match=r"--engine torch: .*model\.onnx is for --engine onnxruntime alone"):
        load_engine(EngineOptions(str(path), engine="torch"))
