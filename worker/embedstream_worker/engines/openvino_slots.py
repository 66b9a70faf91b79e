"""A converted model, compiled, and its requests: each computes one batch at a time."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any, cast

import openvino

from embedstream.outputs import Kind
from embedstream_worker.engines.arrays import ARRAYS, results_of
from embedstream_worker.engines.base import OutOfMemory, Results, Role, TokenBatch
from embedstream_worker.engines.graph_inputs import graph_inputs
from embedstream_worker.engines.openvino_cache import Entry
from embedstream_worker.engines.precision import Precision
from embedstream_worker.engines.text_engine import ran_out_of_memory

_SHARE_A_SCALE = 128
"""Neighbours in a row of activations that share a scale in int8, where it is found while they are multiplied.
OpenVINO's own 32 takes 10 % more time, for cosines 0.00004 nearer to 1."""

_Slot = dict[Role, Any]  # an openvino.InferRequest for each role


class Slots:
    """Callable from several threads: each call takes one of `count` requests, and waits for it."""

    def __init__(self, entry: Entry, precision: Precision, *, count: int, streams: int, threads: int) -> None:
        """`streams`: batches that are computed at the same moment, on `threads` threads in all."""
        self.count = count
        self._model = entry.conversion.model
        self._kinds: tuple[Kind, ...] = (*entry.conversion.outputs,)
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        # Beside int8, bfloat16 would be a few percent faster still, but OpenVINO 2026.4 then gives one-row batches of
        # some lengths other vectors.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
        }
        if precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _SHARE_A_SCALE
        core = openvino.Core()
        compiled = {
            name: core.compile_model(core.read_model(entry.folder / f"{name}.xml"), "CPU", settings)
            for name in set(entry.conversion.graphs.values())
        }
        for _ in range(count):
            requests = {name: graph.create_infer_request() for name, graph in compiled.items()}
            self._free.put({role: requests[name] for role, name in entry.conversion.graphs.items()})

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""
        slot = self._free.get()
        try:
            request = slot[batch.role]
            request.infer(graph_inputs(self._model, batch), share_inputs=True)
            first, results = 0, {}
            for kind in self._kinds:
                places = range(first, first + ARRAYS[kind])
                first += ARRAYS[kind]
                if batch.kinds is None or kind in batch.kinds:
                    results[kind] = results_of(
                        kind, [request.get_output_tensor(place).data for place in places], len(batch)
                    )
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OutOfMemory(f"{len(batch)} texts of up to {batch.longest} tokens: {reason}") from error
        finally:
            self._free.put(slot)
        return cast("Results", results)

    def close(self) -> None:
        """Give the model's memory back. Calls that are under way end first."""
        for _ in range(self.count):
            self._free.get()
        self.count = 0
