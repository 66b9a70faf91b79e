"""From a model folder to OpenVINO graphs: the transformer and sentence-transformers' own tail as one, out of torch."""

from __future__ import annotations

import gc
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import openvino
import tokenizers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Role
from embedstream_worker.engines.checking import Vectors, check_batches
from embedstream_worker.engines.openvino_cache import Conversion, NotConvertible
from embedstream_worker.engines.text_input import InputKind, TextModel
from embedstream_worker.engines.torch_engine import TorchEngine, is_out_of_memory, sentence_vectors
from embedstream_worker.engines.torch_loading import quiet
from embedstream_worker.models import ModelFolder

_EXAMPLE_ROWS, _EXAMPLE_TOKENS = 3, 16


def convert(folder: ModelFolder, into: Path) -> Conversion:
    """Write a model's graphs into a folder, and embed the check's texts with the original for reference.

    Raises:
        ModelError: the model cannot be loaded.
        NotConvertible: OpenVINO has no way to run this architecture, or nothing to gain from it.
    """
    engine = TorchEngine(folder, "cpu", "float32")
    engine.start()
    model = engine.text_model
    if model.input.kind is not InputKind.PADDED:
        raise NotConvertible("it is a table of vectors, which torch looks up as fast")
    if not isinstance(model.input.source, tokenizers.Tokenizer):
        raise NotConvertible("its tokenizer is written in Python, which is the slower half of it")
    references: list[Vectors] = [engine.embed(batch)["embedding"] for batch in check_batches(model)]
    # Without ways of their own, all roles share one graph.
    routed = any(isinstance(part, Router) for part in engine.modules.modules())
    graphs: dict[Role, str] = {}
    for role in model.roles:
        graphs[role] = role if routed or not graphs else next(iter(graphs.values()))
        if graphs[role] == role:
            _write_graph(engine.modules, model, role, into / f"{role}.xml")
    engine.close()
    gc.collect()  # the weights are in the graphs now; the originals' memory is wanted back before those are compiled
    return Conversion(model, graphs, references)


def _write_graph(modules: SentenceTransformer, model: TextModel, role: Role, path: Path) -> None:
    example = [
        torch.from_numpy(array) for array in model.input.pad(model.input.sample(_EXAMPLE_ROWS, _EXAMPLE_TOKENS, role))
    ]
    # Uneven on purpose: with full rows only, tracing would find that no mask is needed.
    example[1][1, slice(0, 5) if model.input.padding_side == "left" else slice(-5, None)] = 0
    if model.excludes_prompt:
        example.append(example[1].clone())
    graph = _Graph(modules, model, role)
    try:  # whatever a frontend raises, another engine runs the model
        with _silence(), _finite_attention(), torch.inference_mode():
            converted = openvino.convert_model(graph, example_input=tuple(example))
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(f"no memory to convert model {model.name} for openvino; use --engine torch") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotConvertible(f"its architecture does not convert ({lines[0][:200]})") from error
    finally:
        graph.release()
    openvino.save_model(converted, path, compress_to_fp16=False)


class _Graph(torch.nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, modules: SentenceTransformer, model: TextModel, role: Role) -> None:
        super().__init__()
        self._modules_of_model = modules
        self._role = role
        self._token_types = model.input.token_types
        self._pooling_mask: list[torch.Tensor] = []
        self._hooks = [
            part.register_forward_pre_hook(self._swap_mask)
            for part in modules.modules()
            if isinstance(part, Pooling) and not part.include_prompt
        ]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooling_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Vectors, [n, dim]. `pooling_mask`: the attention mask without the prompt, if pooling leaves that out."""
        self._pooling_mask[:] = [] if pooling_mask is None else [pooling_mask]
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._token_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        return sentence_vectors(self._modules_of_model, features, self._role)

    def release(self) -> None:
        """Leave the modules as they were."""
        for hook in self._hooks:
            hook.remove()

    def _swap_mask(self, _module: torch.nn.Module, inputs: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:
        # Pooling's own way to leave the prompt out depends on its values, which tracing cannot follow.
        return ({**inputs[0], "attention_mask": self._pooling_mask[0]},) if self._pooling_mask else inputs


def quantize(source: Path, into: Path, samples: Sequence[Callable[[], Any]]) -> None:
    """Write the int8 form of a graph, calibrated with samples: inputs of the graph, made when they are needed."""
    with _silence():
        import nncf

        nncf.set_log_level(logging.ERROR)
        quantized = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(samples, lambda make: make()),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
    openvino.save_model(quantized, into, compress_to_fp16=False)


@contextmanager
def _finite_attention() -> Iterator[None]:
    """Let tokens that may look at nothing look at everything: paddings far from any text, with sliding windows.

    Torch gives them zeros, OpenVINO NaN, which would go from there to all others as 0 x NaN.
    """
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def masked(*arguments: Any, local_size: int | None = None, **options: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = original(*arguments, local_size=local_size, **options)
        if mask is None or local_size is None:
            return mask
        return mask | ~mask.any(dim=-1, keepdim=True)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = masked
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = original


@contextmanager
def _silence() -> Iterator[None]:
    """No reports, no warnings about tracing, nothing sent anywhere."""
    with quiet(), _no_telemetry(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Converters report their use to their makers unless they believe to be in a test run."""
    wanted = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
