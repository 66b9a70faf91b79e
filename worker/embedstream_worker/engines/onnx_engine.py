"""Models as ONNX graphs, with ONNX Runtime on the CPU or a CUDA device: padded batches in float32."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnxruntime

from embedstream.dataset.values import Ragged
from embedstream.errors import ModelError
from embedstream.machine import cpu_cores
from embedstream_worker.cache import cache_folder, version_of
from embedstream_worker.engines.base import EngineInfo, OutOfMemory, Results, Role, TokenBatch
from embedstream_worker.engines.calibration import calibration_hash
from embedstream_worker.engines.checking import CHECK_BATCHES, CheckFailed, check, check_batches
from embedstream_worker.engines.onnx_slot import INPUTS, Slot, Step, Way
from embedstream_worker.engines.openvino_cache import Cache, Conversion, Entry, NotConvertible
from embedstream_worker.engines.precision import Dtype, streams_for
from embedstream_worker.engines.text_engine import TextEngine, ran_out_of_memory
from embedstream_worker.families import card_prompts
from embedstream_worker.fingerprint import file_sha256
from embedstream_worker.model_folder import list_modules
from embedstream_worker.model_weights import find_graph
from embedstream_worker.models import ModelFolder
from embedstream_worker.purpose import Purpose
from embedstream_worker.recipe import origin_of

if TYPE_CHECKING:
    from embedstream_worker.engines.onnx_conversion import Carried

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 2048
"""As for the other engines on the CPU, whose caches set it."""

GPU_BATCH_TOKENS = 65_536

_RECIPE = "3"  # part of every key: to be raised when the export changes
_EXPORTERS = ("torch", "transformers", "sentence-transformers")
_TOKEN_OUTPUTS = ("last_hidden_state", "token_embeddings")
_TEXT_OUTPUT, _SCORES = "sentence_embedding", "logits"


class OnnxEngine(TextEngine):
    """Vectors, scores of pairs or labels, equal to sentence-transformers' own in float32, without torch once the graphs
    are in the cache.

    A folder's own `onnx/model.onnx` is used as it is, followed by the folder's tail; else, or if its vectors are wrong,
    both are exported from torch and kept. `run` may be called from several threads: each call takes one of
    `in_flight` slots, and waits for it.

    `--engine auto` never takes it: on the CPU it is as fast as torch in float32 and slower than OpenVINO, and on CUDA
    torch runs in bfloat16.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str = "auto",
        dtype: Dtype = "auto",
        cache: Cache | None = None,
        threads: int | None = None,
        runs: int | None = None,
        affinity: Sequence[int] = (),
    ) -> None:
        """Export the model, or read what was exported, and prove that its vectors are right.

        `threads`: those of one run; `runs`: how many runs at once. Both are chosen from the cores if None.

        `affinity`: the processors, numbered from 0, on which a run's further threads stay; the first thread of a run is
        the caller's own. One for each, so one fewer than `threads`.

        Raises:
            ModelError: the model or the device is not available, it cannot be exported, or its vectors are wrong.
        """
        if threads is not None and len(affinity) not in (0, threads - 1):
            raise ModelError(
                f"{len(affinity)} processors for the {threads - 1} further threads of a run; give one each"
            )
        if dtype not in ("auto", "float32"):
            raise ModelError(
                f"--dtype {dtype}: onnxruntime computes in float32; use another engine, or --dtype float32"
            )
        if folder.headed and folder.purpose is not Purpose.PAIRS:
            raise ModelError(
                f"--engine onnxruntime: runs models of one dense vector, rerankers and classifiers, and {folder.name} "
                f"is none; use --engine auto"
            )
        super().__init__()
        self._folder = folder
        runs_of_cores = streams_for(cpu_cores())
        self._threads = threads or max(1, cpu_cores() // (runs or runs_of_cores))
        self._runs = runs or (max(1, cpu_cores() // threads) if threads else runs_of_cores)
        self._affinity = tuple(affinity)
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        self.in_flight = 0  # slots
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._device = _pick_device(device)
        self._cache = cache or Cache(cache_folder("onnx"))
        fingerprint = folder.fingerprint()
        try:
            conversion = self._open(fingerprint, self._cache)
        except (NotConvertible, CheckFailed) as error:
            instead = "use --engine torch" if folder.graph is None else "fetch the model that it was made of"
            raise ModelError(f"onnxruntime does not run model {folder.name} ({error}); {instead}") from error
        model = conversion.model
        kind, number = self._device
        self.info = EngineInfo(
            engine="onnxruntime",
            device=kind if kind == "cpu" else f"{kind}:{number}",
            dtype="float32",
            fingerprint=fingerprint,
            max_length=model.input.max_length,
            padded=True,
            batch_tokens=CPU_BATCH_TOKENS if kind == "cpu" else GPU_BATCH_TOKENS,
            pairs=model.pairs,
            outputs=conversion.outputs,
            card_prompts=card_prompts(folder.name, folder.path),
            origin=origin_of(folder),
        )

    @property
    def held_bytes(self) -> int:
        """What the buffers of all slots that are not at work hold."""
        held = 0
        for _ in range(self._slots.qsize()):
            slot = self._slots.get()
            held += slot.held_bytes
            self._slots.put(slot)
        return held

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""
        slot = self._slots.get()
        try:
            return cast("Results", {self._kind: slot.run(batch)})
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OutOfMemory(f"{len(batch)} texts of up to {batch.longest} tokens: {reason}") from error
        finally:
            self._slots.put(slot)

    def close(self) -> None:
        """Give the model's memory back. Calls that are under way end first."""
        super().close()
        self._drop_slots()
        self._cache.close()

    def _drop_slots(self) -> None:
        for _ in range(self.in_flight):
            self._slots.get()
        self.in_flight = 0

    def _open(self, fingerprint: str, cache: Cache) -> Conversion:
        """Raises `NotConvertible`, `CheckFailed`."""
        if self._folder.graph is not None:
            return self._open_alone(self._folder.graph)
        carried = find_graph(list_modules(self._folder.path)[0].folder)
        if carried is not None:
            try:
                return self._open_carried(carried, fingerprint, cache)
            except (NotConvertible, CheckFailed) as error:
                log.warning("%s is not used, the model is exported anew: %s", carried, error)
                self._drop_slots()
        entry = cache.entry(_key(fingerprint, "whole"), self._folder.name, self._convert)
        steps = {name: self._step(_graph(entry, name), None) for name in set(entry.conversion.graphs.values())}
        self._use({role: (steps[name],) for role, name in entry.conversion.graphs.items()}, entry.conversion)
        log.info("onnxruntime: model %s as exported from torch", self._folder.name)
        return entry.conversion

    def _open_alone(self, graph: Path) -> Conversion:
        """Of a folder without other weights."""
        from embedstream_worker.engines.onnx_alone import read_alone, read_tail

        model, outputs = read_alone(self._folder)
        step = self._step(graph, None)
        _given(step.output, self._folder)
        step = replace(step, tail=read_tail(self._folder, model, step.output))
        conversion = Conversion(model, {}, outputs, [])
        self._make_slots(dict.fromkeys(model.roles, (step,)), conversion)
        [(kind, output)] = outputs.items()
        for batch in check_batches(model):
            found = self._try(batch)[kind]
            if isinstance(found, Ragged) or found.shape != (len(batch), output.dim) or not np.isfinite(found).all():
                raise CheckFailed(f"{graph} does not give {output.dim} finite numbers for each text")
        log.warning(
            "%s is all the weights of model %s: it cannot be compared with float32 torch, and is taken for right as "
            "its numbers are finite",
            *(graph, self._folder.name),
        )
        return conversion

    def _open_carried(self, carried: Path, fingerprint: str, cache: Cache) -> Conversion:
        transformer = self._step(carried, None)
        given = _given(transformer.output, self._folder)

        def convert(into: Path) -> Conversion:
            from embedstream_worker.engines.onnx_conversion import convert_tail

            return convert_tail(self._folder, given, into)

        key = _key(fingerprint, f"behind {given} {file_sha256(carried)}")
        entry = cache.entry(key, self._folder.name, convert)
        tails = {name: self._step(_graph(entry, name), given) for name in set(entry.conversion.graphs.values())}
        ways: dict[Role, Way] = {role: (transformer, tails[name]) for role, name in entry.conversion.graphs.items()}
        self._use(ways, entry.conversion)
        log.info("onnxruntime: %s as it is, followed by the model's own tail", carried)
        return entry.conversion

    def _convert(self, into: Path) -> Conversion:
        # Imported only here: torch takes seconds, and with a model that was exported before it is not needed.
        from embedstream_worker.engines.onnx_conversion import convert

        begun = time.perf_counter()
        conversion = convert(self._folder, into)
        log.info("exported model %s for onnxruntime in %.0f s", self._folder.name, time.perf_counter() - begun)
        return conversion

    def _step(self, path: Path, joint: str | None) -> Step:
        """A session over a graph. Raises `NotConvertible` if it cannot run, or not as a text model's."""
        kind, number = self._device
        providers: list[Any] = ["CPUExecutionProvider"]
        if kind == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": number, "use_tf32": 0}))
        try:  # whatever it raises, another engine runs the model
            session = onnxruntime.InferenceSession(str(path), self._options(), providers=providers)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotConvertible(f"its graph cannot be loaded ({lines[0][:200]})") from error
        if kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise ModelError(f"--device cuda:{number}: onnxruntime cannot use CUDA here; see its own log, or use cpu")
        types = {value.name: value.type for value in session.get_inputs()}
        wanted = {name: "tensor(float)" if name == joint else "tensor(int64)" for name in types}
        known = {*INPUTS, joint}
        if strange := [f"{name}: {kind}" for name, kind in types.items() if name not in known or wanted[name] != kind]:
            raise NotConvertible(f"its graph has inputs that are not known here ({', '.join(strange[:3])})")
        return Step(session, tuple(name for name in types if name != joint), joint, _pick_output(session))

    def _options(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, too
        options.enable_mem_pattern = False  # plans memory for one shape, and batches have many
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = self._threads
        # Threads that spin while they wait take the processor from tokenizing and from the other runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._affinity:
            processors = ";".join(str(processor + 1) for processor in self._affinity)  # counted from 1 there
            options.add_session_config_entry("session.intra_op_thread_affinities", processors)
        return options

    def _use(self, ways: dict[Role, Way], conversion: Conversion) -> None:
        """Make slots, and prove that what comes out of them is the model. Raises `CheckFailed`."""
        self._make_slots(ways, conversion)
        check([self._try(batch) for batch in check_batches(conversion.model)], conversion.references, "float32")

    def _make_slots(self, ways: dict[Role, Way], conversion: Conversion) -> None:
        model = conversion.model
        self.in_flight = self._runs if self._device[0] == "cpu" else 1
        self.text_model = model
        [(self._kind, output)] = conversion.outputs.items()
        for _ in range(self.in_flight):
            self._slots.put(Slot(ways, model, output.dim, self._device))

    def _try(self, batch: TokenBatch) -> Results:
        """Raises `CheckFailed`."""
        try:
            return self.run(batch)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckFailed(f"its graph does not run: {lines[0][:200]}") from error


def _graph(entry: Entry, name: str) -> Path:
    return entry.folder / f"{name}.onnx"


def _pick_output(session: Any) -> str:
    types = {value.name: value.type for value in session.get_outputs()}
    # Vectors of tokens first: the folder's own tail is the truth about pooling.
    known = (*_TOKEN_OUTPUTS, _TEXT_OUTPUT, _SCORES, "embedding")
    found = next((name for name in known if types.get(name) == "tensor(float)"), None)
    if found is None:
        given = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise NotConvertible(f"its graph has none of the outputs {', '.join(known[:4])} in float32 (it has: {given})")
    return found


def _given(output: str, folder: ModelFolder) -> Carried:
    """What a carried graph gives. Raises `NotConvertible` for something else than what the model is for."""
    if (output == _SCORES) != (folder.purpose is Purpose.PAIRS):
        raise NotConvertible(f"its graph gives {output}, which are no results of a {folder.purpose}")
    if output == _SCORES:
        return "logits"
    return "sentence_embedding" if output == _TEXT_OUTPUT else "token_embeddings"


def _pick_device(wanted: str) -> tuple[str, int]:
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    kind, _, number = wanted.partition(":")
    if kind == "auto":
        return ("cuda", 0) if has_cuda else ("cpu", 0)
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ModelError(f"--device {wanted}: onnxruntime runs on cpu or cuda:N; use one of them, or --engine torch")
    if kind == "cuda" and not has_cuda:
        raise ModelError(
            f"--device {wanted}: onnxruntime is installed without CUDA; install onnxruntime-gpu in its place"
        )
    return kind, int(number or 0)


def _key(fingerprint: str, form: str) -> tuple[str, ...]:
    versions = (f"{package} {version_of(package)}" for package in _EXPORTERS)
    return (_RECIPE, CHECK_BATCHES, fingerprint, form, calibration_hash(), *versions)
