"""From a model folder to ONNX graphs: all of it, or what follows a transformer that the folder carries as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Role
from embedstream_worker.engines.conversion import convert_with, silence
from embedstream_worker.engines.graph_inputs import third_input
from embedstream_worker.engines.headed_engine import HeadedEngine
from embedstream_worker.engines.openvino_cache import Conversion, NotConvertible
from embedstream_worker.engines.out_of_memory import is_out_of_memory
from embedstream_worker.engines.text_input import TextModel
from embedstream_worker.engines.torch_graph import Graph, Original, graph_example, traceable
from embedstream_worker.models import ModelFolder

Carried = Literal["token_embeddings", "sentence_embedding", "logits"]
"""What a carried transformer gives: a vector per token, or one per text; or scores before their activation."""

VECTORS = "embedding"
"""The output's name in graphs that are written here."""

_OPSET = 18


def convert(folder: ModelFolder, into: Path) -> Conversion:
    """Write a model's graphs, transformer and tail in one, and run the check's texts through the original.

    Raises:
        ModelError: the model cannot be loaded.
        NotConvertible: the architecture cannot be exported, or there is nothing to gain from it.
    """
    return convert_with(_write_whole, ".onnx", folder, into)


def convert_tail(folder: ModelFolder, given: Carried, into: Path) -> Conversion:
    """The same for what follows the transformer alone. Raises as `convert`."""

    def write(original: Original, role: Role, path: Path) -> None:
        _write_tail(original, role, given, path)

    return convert_with(write, ".onnx", folder, into)


def _write_whole(original: Original, role: Role, path: Path) -> None:
    graph = Graph(original, role)
    try:
        _export(graph, _inputs(original.text_model, role), original.text_model.name, path)
    finally:
        graph.release()


def _inputs(model: TextModel, role: Role) -> dict[str, torch.Tensor]:
    """By name."""
    names = ("input_ids", "attention_mask", third_input(model) or "")
    return dict(zip(names, graph_example(model, role), strict=False))


def _write_tail(original: Original, role: Role, given: Carried, path: Path) -> None:
    model = original.text_model
    if isinstance(original, HeadedEngine):
        scores = torch.rand(2, next(iter(original.info.outputs.values())).dim)
        _export(_Activated(original), {given: scores}, model.name, path)
        return
    inputs = _inputs(model, role)
    with torch.no_grad():
        features = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if model.input.token_types:
            features["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        first = next(original.modules.children())
        # A router's transformers lie in folders of their own.
        tokens = first({"modality": "text", **features}).get("token_embeddings")
        if tokens is None:
            raise NotConvertible("its first module is not a transformer")
        if given == "sentence_embedding":
            example: dict[str, torch.Tensor] = {given: original.tensors(features, role)[0]}
            _export(_Cut(model), example, model.name, path)
            return
    graph = _Tail(original, role)
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
    ) -> tuple[torch.Tensor, ...]:
        self._pooling_mask[:] = [] if pooling_mask is None else [pooling_mask]
        features = {"token_embeddings": token_embeddings, "input_ids": input_ids, "attention_mask": attention_mask}
        first = next(self._modules_of_model.children())
        original = first.forward
        first.forward = _give_back
        try:
            return self._original.tensors(features, self._role)
        finally:
            first.forward = original


def _give_back(features: dict[str, Any], **_: Any) -> dict[str, Any]:
    return features


class _Activated(torch.nn.Module):
    """What turns logits of pairs into scores."""

    def __init__(self, original: HeadedEngine) -> None:
        super().__init__()
        self._finish = original.finish

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._finish({"scores": logits})


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
    for name in axes.keys() & {"sentence_embedding", "logits"}:
        del axes[name][1]
    try:  # whatever the exporter raises, another engine runs the model
        with silence(), traceable(), torch.no_grad():
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
