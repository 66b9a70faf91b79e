"""Models converted from torch, on the CPU with OpenVINO: padded batches, several of them at once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import time
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import openvino

from embedstream.machine import cpu_cores
from embedstream_worker.engines.arrays import ARRAYS, results_of
from embedstream_worker.engines.base import (
    Engine,
    EngineInfo,
    OutOfMemory,
    OwnQueries,
    Results,
    Role,
    TokenBatch,
    fitting,
)
from embedstream_worker.engines.calibration import calibration_hash, calibration_texts
from embedstream_worker.engines.checking import check, check_batches
from embedstream_worker.engines.graph_inputs import graph_inputs
from embedstream_worker.engines.openvino_cache import Cache, Conversion, Entry
from embedstream_worker.engines.phases import CHECKING, phase
from embedstream_worker.engines.precision import Precision, streams_for
from embedstream_worker.engines.text_engine import TextEngine, ran_out_of_memory
from embedstream_worker.families import card_prompts
from embedstream_worker.models import ModelFolder
from embedstream_worker.recipe import origin_of
from embedstream_worker.tokenizing import encode_each

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""MiniLM on 2 cores: 1024 to 4096 are within 5 % of each other."""

_RECIPE = "3"  # part of every key: to be raised when conversion or calibration change
CONVERTERS = ("openvino", "torch", "transformers", "sentence-transformers")
CALIBRATORS = ("openvino", "nncf")
_LONGEST_CALIBRATION_TOKENS = 384

_Slot = dict[Role, Any]  # an openvino.InferRequest for each role


class OpenVinoEngine(TextEngine):
    """Results equal to sentence-transformers' own within the precision, several times as fast as its float32.

    One pass through the graph gives all kinds of results.

    `run` may be called from several threads: each call takes one of `in_flight` requests, and waits for it.
    """

    def __init__(self, folder: ModelFolder, precision: Precision, fingerprint: str, cache: Cache) -> None:
        """Convert the model, or read what was converted, and prove that its results are right.

        `fingerprint`: the folder's own.

        Raises:
            NotConvertible: it does not convert.
            CheckFailed: its results are wrong.
            ModelError: the model cannot be loaded.
        """

        super().__init__(self._load_torch)
        # Beside a model on the CPU, tokenizing must not take more than its own thread; a user's own choice stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._folder = folder
        self._cache = cache
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        entry = cache.entry(key_of(fingerprint, "float", CONVERTERS), self._folder.name, self._convert)
        if precision == "int8":
            fingerprint = f"{fingerprint}-int8-{_calibration()}"
            parts = key_of(fingerprint, "int8", (*CONVERTERS, *CALIBRATORS))
            entry = cache.entry(parts, self._folder.name, lambda into: _quantize(entry, into))
        self._compile(entry, precision)
        phase(CHECKING)
        model, outputs = entry.conversion.model, entry.conversion.outputs
        found = [self.run(batch) for batch in check_batches(model)]
        agreement = check(found, entry.conversion.references, precision)
        log.info("openvino in %s, to float32 on the check's texts: %s", precision, agreement)
        self.info = EngineInfo(
            engine="openvino",
            device="cpu",
            dtype=precision,
            fingerprint=fingerprint,
            max_length=model.input.max_length,
            padded=True,
            batch_tokens=fitting(BATCH_TOKENS, outputs),
            pairs=model.pairs,
            outputs=outputs,
            card_prompts=card_prompts(folder.name, folder.path),
            origin=origin_of(folder),
        )

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""
        slot = self._slots.get()
        try:
            request = slot[batch.role]
            request.infer(graph_inputs(self.text_model, batch), share_inputs=True)
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
            self._slots.put(slot)
        return cast("Results", results)

    def close(self) -> None:
        """Give the model's memory back. Calls that are under way end first."""
        super().close()
        for _ in range(self.in_flight):
            self._slots.get()
        self.in_flight = 0
        self._cache.close()

    def _load_torch(self) -> Engine:
        # Imported only here: an engine that needs no torch must not load it for nothing.
        from embedstream_worker.engines.headed_engine import load_torch

        return load_torch(self._folder, "cpu", "float32")

    def _convert(self, into: Path) -> Conversion:
        # Imported only here: torch takes seconds, and with a model that was converted before it is not needed.
        from embedstream_worker.engines.openvino_conversion import convert

        begun = time.perf_counter()
        conversion = convert(self._folder, into)
        log.info("converted model %s for openvino in %.0f s", self._folder.name, time.perf_counter() - begun)
        return conversion

    def _compile(self, entry: Entry, precision: Precision) -> None:
        streams = streams_for(cpu_cores())
        # Beside int8, bfloat16 would be a fifth faster still, but OpenVINO 2026.4 then gives one-row batches of some
        # lengths other vectors (cosine 0.88 instead of 0.99).
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": cpu_cores(),
        }
        core = openvino.Core()
        compiled = {
            name: core.compile_model(core.read_model(entry.folder / f"{name}.xml"), "CPU", settings)
            for name in set(entry.conversion.graphs.values())
        }
        # One more than streams: while a stream computes, the next batch is already waiting for it.
        self.in_flight = streams + 1
        for _ in range(self.in_flight):
            requests = {name: graph.create_infer_request() for name, graph in compiled.items()}
            self._slots.put({role: requests[name] for role, name in entry.conversion.graphs.items()})
        self.text_model, self._kinds = entry.conversion.model, (*entry.conversion.outputs,)


class HeadedOpenVinoEngine(OpenVinoEngine):
    """The same for models whose queries may go a way of their own, which is in torch."""

    def query(self, text: str, prompt: str | None) -> Results:
        """As `OwnQueries` has it. The first loads torch, and the model once more."""
        exact = self.exact(self._load_torch, "for queries")
        assert isinstance(exact, OwnQueries)
        return exact.query(text, prompt)


def key_of(fingerprint: str, form: str, packages: tuple[str, ...]) -> tuple[str, ...]:
    """What a cache's entry was made of, and with."""
    versions = (f"{package} {_version(package)}" for package in packages)
    return (_RECIPE, fingerprint, form, calibration_hash(), *versions)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _calibration() -> str:
    """8 hex digits: equal where int8 gives the same space."""
    versions = map(_version, CALIBRATORS)
    return blake2b("\0".join((_RECIPE, calibration_hash(), *versions)).encode(), digest_size=4).hexdigest()


def _quantize(source: Entry, into: Path) -> Conversion:
    from embedstream_worker.engines.openvino_conversion import quantize

    begun = time.perf_counter()
    model = source.conversion.model
    limit = min(model.input.max_length, _LONGEST_CALIBRATION_TOKENS)
    tokens, _ = encode_each(model.input.tokenizer(), calibration_texts(), limit)
    for role, name in source.conversion.graphs.items():
        if (into / f"{name}.xml").exists():
            continue
        batches = [
            TokenBatch(tokens.ids[start:stop], np.array([0, stop - start]), int(stop - start), 0, role)
            for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
            if stop > start
        ]
        samples = [lambda batch=batch: dict(enumerate(graph_inputs(model, batch))) for batch in batches]
        quantize(source.graph(role), into / f"{name}.xml", samples)
    log.info("calibrated model %s for int8 in %.0f s", model.name, time.perf_counter() - begun)
    return source.conversion
