"""Models converted from torch, on the CPU with OpenVINO: padded batches, several of them at once."""

from __future__ import annotations

import logging
import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from embedstream.machine import cpu_cores
from embedstream_worker.cache import version_of
from embedstream_worker.engines.base import Engine, EngineInfo, OwnQueries, Results, TokenBatch, fitting
from embedstream_worker.engines.calibration import calibration_hash, calibration_texts
from embedstream_worker.engines.checking import CHECK_BATCHES, check, check_batches
from embedstream_worker.engines.graph_inputs import graph_inputs
from embedstream_worker.engines.openvino_cache import Cache, Conversion, Entry
from embedstream_worker.engines.openvino_slots import Slots
from embedstream_worker.engines.phases import CHECKING, phase
from embedstream_worker.engines.precision import Precision, streams_for, threads_of_a_stream
from embedstream_worker.engines.text_engine import TextEngine
from embedstream_worker.families import card_prompts
from embedstream_worker.models import ModelFolder
from embedstream_worker.recipe import origin_of
from embedstream_worker.tokenizing import encode_each

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""MiniLM on 2 cores: 1024 to 4096 are within 5 % of each other."""

_RECIPE = "6"  # part of every key: to be raised when conversion or calibration change
CONVERTERS = ("openvino", "torch", "transformers", "sentence-transformers")
CALIBRATORS = ("openvino", "nncf")
_LONGEST_CALIBRATION_TOKENS = 384


class OpenVinoEngine(TextEngine):
    """Results equal to sentence-transformers' own within the precision, several times as fast as its float32.

    One pass through the graph gives all kinds of results.

    `run` may be called from several threads: see `Slots`.
    """

    def __init__(
        self, folder: ModelFolder, precision: Precision, fingerprint: str, cache: Cache, tried: bool = False
    ) -> None:
        """Convert the model, or read what was converted, and prove that its results are right.

        `fingerprint`: the folder's own. `tried`: all check texts were compared on this machine before: the shortest of
        each graph is enough to see that the files are still good.

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
        entry = cache.entry(key_of(fingerprint, "float", CONVERTERS), self._folder.name, self._convert)
        if precision == "int8":
            fingerprint = f"{fingerprint}-int8-{_calibration()}"
            parts = key_of(fingerprint, "int8", (*CONVERTERS, *CALIBRATORS))
            entry = cache.entry(parts, self._folder.name, lambda into: _quantize(entry, into))
        self._entry, self._precision = entry, precision
        model, outputs = entry.conversion.model, entry.conversion.outputs
        self.text_model, streams = model, streams_for(cpu_cores())
        # One more than streams: while a stream computes, the next batch is already waiting for it.
        self.in_flight = streams + 1
        self._slots = Slots(entry, precision, count=self.in_flight, streams=streams, threads=cpu_cores())
        phase(CHECKING)
        checked = [*zip(check_batches(model), entry.conversion.references, strict=True)]
        if tried:
            longest_first, graphs = sorted(checked, key=lambda pair: -len(pair[0].ids)), entry.conversion.graphs
            checked = [*{graphs[pair[0].role]: pair for pair in longest_first}.values()]
        agreement = check([self.run(batch) for batch, _ in checked], [expected for _, expected in checked], precision)
        log.info(
            "openvino in %s, to float32 on %s: %s", precision, "one text" if tried else "the check's texts", agreement
        )
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
        return self._slots.run(batch)

    def twin(self) -> Engine:
        """The same model with one stream's threads of its own, for one batch at a time."""
        return _Twin(self, self._entry, self._precision)

    def close(self) -> None:
        """Give the model's memory back. Calls that are under way end first."""
        super().close()
        self._slots.close()
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


class _Twin(TextEngine):
    """An engine's model once more; what it does seldom, the engine does."""

    def __init__(self, engine: OpenVinoEngine, entry: Entry, precision: Precision) -> None:
        super().__init__()
        self._engine = engine
        self.info, self.text_model = engine.info, engine.text_model
        self._slots = Slots(entry, precision, count=1, streams=1, threads=threads_of_a_stream())

    def run(self, batch: TokenBatch) -> Results:
        """As `OpenVinoEngine.run`."""
        return self._slots.run(batch)

    def run_exact(self, batch: TokenBatch) -> Results:
        """As `OpenVinoEngine.run_exact`."""
        return self._engine.run_exact(batch)

    def close(self) -> None:
        """Give the memory back."""
        self._slots.close()


class HeadedOpenVinoEngine(OpenVinoEngine):
    """The same for models whose queries may go a way of their own, which is in torch."""

    def query(self, text: str, prompt: str | None) -> Results:
        """As `OwnQueries` has it. The first loads torch, and the model once more."""
        exact = self.exact(self._load_torch, "for queries")
        assert isinstance(exact, OwnQueries)
        return exact.query(text, prompt)


def key_of(fingerprint: str, form: str, packages: tuple[str, ...]) -> tuple[str, ...]:
    """What a cache's entry was made of, and with."""
    versions = (f"{package} {version_of(package)}" for package in packages)
    return (_RECIPE, CHECK_BATCHES, fingerprint, form, calibration_hash(), *versions)


def _calibration() -> str:
    """8 hex digits: equal where int8 gives the same space."""
    versions = map(version_of, CALIBRATORS)
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
