"""From a model folder to ONNX graphs: all of it, or what follows a transformer that the folder carries as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Role
from embedstream_worker.engines.conversion import convert_with, silence
from embedstream_worker.engines.openvino_cache import Conversion, NotConvertible
from embedstream_worker.engines.out_of_memory import is_out_of_memory
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.engines.torch_engine import sentence_vectors
from embedstream_worker.engines.torch_graph import Graph, finite_attention, graph_example
from embedstream_worker.models import ModelFolder

Carried = Literal["token_embeddings", "sentence_embedding"]
"""What a carried transformer gives: a vector per token, or one per text."""

VECTORS = "embedding"
"""The output's name in graphs that are written here."""

_OPSET = 18
_INPUTS = ("input_ids", "attention_mask", "pooling_mask")


def convert(folder: ModelFolder, into: Path) -> Conversion:
    """Write a model's graphs, transformer and tail in one, and embed the check's texts with the original for reference.

    Raises:
        ModelError: the model cannot be loaded.
        NotConvertible: the architecture cannot be exported, or there is nothing to gain from it.
    """
    return convert_with(_write_whole, ".onnx", folder, into)


def convert_tail(folder: ModelFolder, given: Carried, into: Path) -> Conversion:
    """The same for what follows the transformer alone. Raises as `convert`."""

    def write(modules: SentenceTransformer, model: TextModel, role: Role, path: Path) -> None:
        _write_tail(modules, model, role, given, path)

    return convert_with(write, ".onnx", folder, into)


def _write_whole(modules: SentenceTransformer, model: TextModel, role: Role, path: Path) -> None:
    graph = Graph(modules, model, role)
    try:
        _export(graph, dict(zip(_INPUTS, graph_example(model, role), strict=False)), model.name, path)
    finally:
        graph.release()


def _write_tail(modules: SentenceTransformer, model: TextModel, role: Role, given: Carried, path: Path) -> None:
    inputs = dict(zip(_INPUTS, graph_example(model, role), strict=False))
    with torch.no_grad():
        features = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if model.input.token_types:
            features["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        first = next(modules.children())
        # A router's transformers lie in folders of their own.
        tokens = first({"modality": "text", **features}).get("token_embeddings")
        if tokens is None:
            raise NotConvertible("its first module is not a transformer")
        if given == "sentence_embedding":
            example: dict[str, torch.Tensor] = {given: sentence_vectors(modules, features, role)}
            _export(_Cut(model), example, model.name, path)
            return
    graph = _Tail(modules, model, role)
    try:
        _export(graph, {given: tokens, **inputs}, model.name, path)
    finally:
        graph.release()


class _Tail(Graph):
    """All modules but the first, whose tokens' vectors are given."""

    def forward(  # type: ignore[override]
        self,
        token_embeddings: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pooling_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._pooling_mask[:] = [] if pooling_mask is None else [pooling_mask]
        features = {"token_embeddings": token_embeddings, "input_ids": input_ids, "attention_mask": attention_mask}
        first = next(self._modules_of_model.children())
        original = first.forward
        first.forward = _give_back
        try:
            return sentence_vectors(self._modules_of_model, features, self._role)
        finally:
            first.forward = original


def _give_back(features: dict[str, Any], **_: Any) -> dict[str, Any]:
    return features


class _Cut(torch.nn.Module):
    """A model's own cut to fewer dimensions, for graphs that do all the rest."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self._dim, self._normalized = model.dim, model.normalized

    def forward(self, sentence_embedding: torch.Tensor) -> torch.Tensor:
        vectors = sentence_embedding[:, : self._dim]
        return torch.nn.functional.normalize(vectors, dim=1) if self._normalized else vectors.clone()


def _export(graph: torch.nn.Module, example: dict[str, torch.Tensor], model_name: str, path: Path) -> None:
    axes = {name: dict(enumerate(("texts", "tokens")[: tensor.ndim])) for name, tensor in example.items()}
    if "sentence_embedding" in axes:
        del axes["sentence_embedding"][1]
    try:  # whatever the exporter raises, another engine runs the model
        with silence(), finite_attention(), torch.no_grad():
            torch.onnx.export(
                graph,
                tuple(example.values()),
                str(path),
                input_names=list(example),
                output_names=[VECTORS],
                dynamic_axes={**axes, VECTORS: {0: "texts"}},
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(f"no memory to export model {model_name} for onnxruntime; use --engine torch") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotConvertible(f"its architecture cannot be exported ({lines[0][:200]})") from error
