"""From a model folder to OpenVINO graphs: transformer, tail and heads as one, out of torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openvino
import torch
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

from embedstream.errors import ModelError
from embedstream_worker.engines.base import Role
from embedstream_worker.engines.conversion import convert_with, silence
from embedstream_worker.engines.openvino_cache import Conversion, NotConvertible
from embedstream_worker.engines.out_of_memory import is_out_of_memory
from embedstream_worker.engines.torch_graph import Graph, Original, graph_example, traceable
from embedstream_worker.models import ModelFolder


def convert(folder: ModelFolder, into: Path) -> Conversion:
    """Write a model's graphs into a folder, and run the check's texts through the original for reference.

    Raises:
        ModelError: the model cannot be loaded.
        NotConvertible: OpenVINO has no way to run this architecture, or nothing to gain from it.
    """
    return convert_with(_write_graph, ".xml", folder, into)


def _write_graph(original: Original, role: Role, path: Path) -> None:
    model = original.text_model
    example = tuple(graph_example(model, role))
    graph = Graph(original, role)
    try:  # whatever a frontend raises, another engine runs the model
        with silence(), traceable(), torch.inference_mode():
            # Torch would trace it once more, to compare: the check at load does, and by vectors.
            traced = TorchScriptPythonDecoder(graph, example_input=example, trace_kwargs={"check_trace": False})
            converted = openvino.convert_model(traced)
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(f"no memory to convert model {model.name} for openvino; use --engine torch") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotConvertible(f"its architecture does not convert ({lines[0][:200]})") from error
    finally:
        graph.release()
    openvino.save_model(converted, path, compress_to_fp16=False)


def quantize(source: Path, into: Path, samples: Sequence[Callable[[], Any]]) -> None:
    """Write the int8 form of a graph, calibrated with samples: inputs of the graph, made when they are needed.

    Weights are int8 with a scale for each output. So are activations, with one range for each product, found from
    the samples; but those of `_narrows` get their scales while they are computed: see `Slots`.
    """
    with silence():
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        nncf.set_log_level(logging.ERROR)
        quantized = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(samples, lambda make: make()),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # From the least to the greatest of all samples. NNCF's own mean of both cuts off what is beyond, and
                # unusual texts pay for it, with a lowest cosine of 0.989 instead of 0.997.
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                # NNCF's own 0.95 spoils the weights to save the activations that have no range here. The correction
                # of biases changes no vector by more than 0.0002, and takes a third of the time.
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.5),
                disable_bias_correction=True,
            ),
        )
    for product in filter(_narrows, quantized.get_ordered_ops()):
        rounded = product.input_value(0).get_node()
        if rounded.get_type_name() == "FakeQuantize":
            product.input(0).replace_source_output(rounded.input_value(0))
    openvino.save_model(quantized, into, compress_to_fp16=False)


def _narrows(operation: Any) -> bool:
    """Whether it is a product with weights that gives fewer numbers than it takes, such as the second of a feed-forward
    layer. What such a layer takes, behind its activation function, has a few numbers far beyond all others: no
    range suits both.
    """
    if operation.get_type_name() != "MatMul":
        return False
    inputs, outputs = operation.input_value(0).get_partial_shape(), operation.output(0).get_partial_shape()
    wide, narrow = inputs[len(inputs) - 1], outputs[len(outputs) - 1]
    return bool(wide.is_static and narrow.is_static and wide.get_length() > narrow.get_length())
