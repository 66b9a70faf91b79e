"""One run of ONNX Runtime at a time: bound inputs and outputs over memory that the next run uses again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from embedstream.dataset.values import Matrix
from embedstream_worker.engines.base import Role, TokenBatch
from embedstream_worker.engines.text_input import TextInput, TextModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")
"""What a graph may ask for, all of it [n, longest] of int64."""

_Integers = npt.NDArray[np.int64]


Tail = Callable[[npt.NDArray[Any], npt.NDArray[np.bool_]], Matrix]
"""From what a graph gives, and the tokens that are no padding [n, longest], to vectors or scores [n, width]."""


@dataclass(frozen=True)
class Step:
    """One session of a way through the model."""

    session: Any  # an onnxruntime.InferenceSession
    inputs: tuple[str, ...]  # those of `INPUTS` that it takes
    joint: str | None  # the input that is the step before's output
    output: str
    tail: Tail | None = None
    """What makes results of the output, where no graph does."""


Way = tuple[Step, ...]
"""From token ids to vectors: one step for a whole graph, two for a transformer and its tail."""


class Slot:
    """Buffers and bindings of one run. Not safe to share between threads."""

    def __init__(self, ways: Mapping[Role, Way], model: TextModel, width: int, device: tuple[str, int]) -> None:
        """`width`: of what the last steps give."""
        self._ways = ways
        self._model = model
        self._width = width
        self._device = device
        self._bindings = {id(step): step.session.io_binding() for way in ways.values() for step in way}
        self._buffers: dict[str, _Integers] = {}
        self._shrink = False

    @property
    def held_bytes(self) -> int:
        """What the buffers hold between runs."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def run(self, batch: TokenBatch) -> Matrix:
        """Vectors or scores, [n, width], the caller's own.

        After an error nothing is held, and the next run makes it anew.
        """
        try:
            return self._run(batch)
        except BaseException:
            self._buffers.clear()
            self._shrink = True
            raise
        finally:
            for binding in self._bindings.values():
                binding.clear_binding_inputs()
                binding.clear_binding_outputs()

    def _run(self, batch: TokenBatch) -> Matrix:
        way = self._ways[batch.role]
        arrays = self._fill(batch, {name for step in way for name in step.inputs})
        vectors = np.empty((len(batch), self._width), np.float32)
        options = self._options()
        between = None
        for step in way:
            binding = self._bindings[id(step)]
            for name in step.inputs:
                array = arrays[name]
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
            if step.joint is not None:
                binding.bind_ortvalue_input(step.joint, between)
            if step.tail is not None:
                binding.bind_output(step.output, "cpu")
            elif step is way[-1]:
                binding.bind_output(step.output, "cpu", 0, np.float32, vectors.shape, vectors.ctypes.data)
            else:
                binding.bind_output(step.output, *self._device)
            step.session.run_with_iobinding(binding, options)
            if step.tail is not None:
                [given] = binding.copy_outputs_to_cpu()
                return step.tail(given, _real(self._model.input, batch, 0))
            if step is not way[-1]:
                [between] = binding.get_outputs()
        self._shrink = False
        return vectors

    def _options(self) -> Any:
        options = onnxruntime.RunOptions()
        if self._shrink:  # the arena keeps what the largest batch ever took; after one that failed, for nothing
            kind, number = self._device
            arena = f"{'gpu' if kind == 'cuda' else kind}:{number}"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        return options

    def _fill(self, batch: TokenBatch, names: set[str]) -> dict[str, _Integers]:
        shape = (len(batch), batch.longest)
        arrays = {name: self._take(name, shape) for name in names}
        text_input = self._model.input
        real = _real(text_input, batch, 0)
        if "input_ids" in arrays:
            arrays["input_ids"].fill(text_input.pad_id)
            arrays["input_ids"][real] = batch.ids
        if "attention_mask" in arrays:
            arrays["attention_mask"][:] = real
        if "token_type_ids" in arrays:
            arrays["token_type_ids"].fill(0)
            if batch.types is not None:
                arrays["token_type_ids"][real] = batch.types
        if "pooling_mask" in arrays:
            arrays["pooling_mask"][:] = _real(text_input, batch, batch.prompt_length)
        return arrays

    def _take(self, name: str, shape: tuple[int, int]) -> _Integers:
        size = shape[0] * shape[1]
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.int64)
        return self._buffers[name][:size].reshape(shape)


def _real(text_input: TextInput, batch: TokenBatch, prompt_length: int) -> npt.NDArray[np.bool_]:
    """Where the texts' tokens are, [n, longest], without the prompt's."""
    places, lengths = np.arange(batch.longest), batch.lengths[:, None]
    if text_input.padding_side == "left":
        real: npt.NDArray[np.bool_] = places >= batch.longest - lengths + prompt_length
        return real
    return (places >= prompt_length) & (places < lengths)
