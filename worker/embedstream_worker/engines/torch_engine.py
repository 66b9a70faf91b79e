"""Sentence-transformers' own modules in torch: on GPUs in packed batches where a model can, else in padded ones."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedstream.errors import ModelError
from embedstream_worker.engines.attention_check import check_attention
from embedstream_worker.engines.base import (
    HARMLESS,
    EngineInfo,
    OutputInfo,
    Results,
    Role,
    TokenBatch,
)
from embedstream_worker.engines.batch_budget import Probe, find_budget, seconds_a_batch
from embedstream_worker.engines.checking import CheckFailed, Vectors, check_batches, compare, require
from embedstream_worker.engines.compiling import CannotCompile, compiling, release
from embedstream_worker.engines.fusing import fuse_gelu, fuse_projections
from embedstream_worker.engines.lanes import CudaLanes, DirectLanes, Lanes
from embedstream_worker.engines.lowering import to_bfloat16, upcast
from embedstream_worker.engines.out_of_memory import is_out_of_memory, within_memory
from embedstream_worker.engines.packed_attention import Asked, CannotPack, is_fast, noting
from embedstream_worker.engines.packed_batch import TOKENS_STEP, fill_up, only
from embedstream_worker.engines.precision import Dtype, Precision
from embedstream_worker.engines.text_engine import TextEngine
from embedstream_worker.engines.text_input import LONGEST_TRIED, ROLE_PROMPTS, InputKind, TextInput, TextModel
from embedstream_worker.engines.torch_device import pick_device, pick_dtype, share_cores
from embedstream_worker.engines.torch_features import (
    Packing,
    first_position,
    flat_features,
    packed_features,
    padded_features,
    transformers_of,
    vocabulary_size,
)
from embedstream_worker.engines.torch_loading import excludes_prompt, is_normalized, load_model, read_input
from embedstream_worker.families import card_prompts
from embedstream_worker.models import ModelFolder
from embedstream_worker.recipe import origin_of

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 2048
"""MiniLM on 2 cores: 1024 to 4096 are within 10 % of each other, 8192 takes 1.7 times as long (caches)."""

GPU_BATCH_TOKENS = 65_536
"""Enough to fill a large GPU with a small model, where it is not measured; on out-of-memory the worker halves it."""

Batches = Literal["auto", "packed", "padded"]

_REFUSALS = (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError)
"""What models raise at input that they were not made for."""

_USUAL_TOKENS = 128  # the time of a batch depends on its tokens, and hardly on how many texts they make


class TorchEngine(TextEngine):
    """Vectors equal to `encode_document` and `encode_query` of sentence-transformers, within the precision.

    In bfloat16 only the transformer computes in it; pooling and what follows stay in float32. `batches` "auto" packs
    texts without padding on CUDA in bfloat16, if the model's vectors stay what they are. `compiles`: run packed batches
    through compiled code with fewer kernels, on the same condition. `run` may be called from several threads.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str = "auto",
        dtype: Dtype = "auto",
        batches: Batches = "auto",
        compiles: bool = False,
    ) -> None:
        """Load the model and try it. Raises `ModelError`."""
        super().__init__(lambda: TorchEngine(folder, "cpu", "float32"))
        self._folder = folder
        self._wanted_dtype = dtype
        self._compiles = compiles
        self._compiled = False
        self._lanes: Lanes = DirectLanes(torch.device("cpu"))
        self._asked: set[Asked] = set()
        place = pick_device(device)
        dtype = pick_dtype(dtype, place)
        share_cores(place)
        packs = batches == "packed" or (batches == "auto" and place.type == "cuda" and dtype == "bfloat16")
        self._load(torch.device("cpu"))
        packs = packs and self._can_pack()
        self._lanes = CudaLanes(place) if place.type == "cuda" else DirectLanes(place)
        self._place(place)
        dtype = self._speed_up(dtype, packs)
        if compiles and not self._packed:
            log.warning("model %s runs eagerly, as only packed batches are compiled", folder.name)
        self.in_flight = self._lanes.count
        model = self.text_model
        self.info = EngineInfo(
            engine="torch",
            device=str(place),
            dtype=dtype,
            fingerprint=folder.fingerprint(),
            max_length=model.input.max_length,
            padded=model.input.kind is InputKind.PADDED and not self._packed,
            batch_tokens=self._batch_tokens(place),
            outputs={"dense": OutputInfo(dim=model.dim, normalized=model.normalized)},
            card_prompts=card_prompts(folder.name, folder.path),
            origin=origin_of(folder),
        )
        if place.type == "cuda":
            how = "padded" if self.info.padded else "packed without padding"
            how += ", compiled" if self._compiled else ""
            log.info("torch in %s on %s: batches of %d tokens, %s", dtype, place, self.info.batch_tokens, how)

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""
        return within_memory(batch, lambda: {"dense": self._run(batch)})

    def tensors(self, features: dict[str, Any], role: Role) -> tuple[torch.Tensor, ...]:
        """Vectors [n, dim], from ids and masks."""
        return (sentence_vectors(self.modules, features, role),)

    def close(self) -> None:
        """Give the model's memory back."""
        super().close()
        if self._compiled:
            release(self.modules)
        del self.modules, self._packing, self._lanes
        gc.collect()  # modules and their hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, device: torch.device) -> None:
        """In float32, and everything that there is to know about it."""
        self.modules = load_model(self._folder, device)
        self._packed = False
        self._tokens_step = 1
        self._packing = Packing(self.modules)
        self._first_position = first_position(self.modules)
        self._vocabulary = vocabulary_size(self.modules)
        text_input = read_input(self.modules, self._folder.name)
        self.text_model = TextModel(
            name=self._folder.name,
            input=text_input,
            prompts={name: str(prompt) for name, prompt in self.modules.prompts.items()},
            default_prompt_name=self.modules.default_prompt_name,
            roles=self._find_roles(text_input),
            normalized=is_normalized(self.modules),
            excludes_prompt=excludes_prompt(self.modules),
        )

    def _place(self, device: torch.device) -> None:
        try:
            self.modules.to(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(f"model {self._folder.name} does not fit into {device}: {error}") from error
        _wait_for(device)

    def _can_pack(self) -> bool:
        """Whether packing leaves a few short texts their vectors: on the CPU, where a model that reads beyond its
        tables raises an error. On a GPU that would end the process.
        """
        model = self.text_model
        if model.input.kind is not InputKind.PADDED:
            return False
        batches = [few_texts(model, role) for role in model.roles]
        references = self._vectors(batches)
        with noting() as self._asked:
            failure = self._try_packed(batches, references, "float32")
        self._pack(on=False)
        if failure:
            log.warning("model %s runs in padded batches, as it cannot be packed: %s", self._folder.name, failure)
        return failure is None

    def _speed_up(self, dtype: Dtype, packs: bool) -> Dtype:
        """Pack, and let the transformer compute in bfloat16, if its vectors stay what they are; the dtype it is in."""
        if dtype == "float32" and not packs:
            return dtype
        if not transformers_of(self.modules):
            return "float32"  # a table of vectors: nothing to compute
        batches = check_batches(self.text_model)
        references = self._vectors(batches)
        if packs and (failure := self._try_packed(batches, references, "float32")):
            packs = False
            self._pack(on=False)
            log.warning("model %s runs in padded batches, as packed ones fail: %s", self._folder.name, failure)
        if dtype == "bfloat16":
            dtype = self._lower(batches, references)
        if self._compiles and self._packed:
            self._compile(batches, references, "bfloat16" if dtype == "bfloat16" else "float32")
        return dtype

    def _lower(self, batches: Sequence[TokenBatch], references: Sequence[Vectors]) -> Dtype:
        device = torch.device(self.modules.device)
        for transformer in transformers_of(self.modules):
            to_bfloat16(transformer)
            transformer.register_forward_hook(_upcast)
        _wait_for(device)
        failure = None
        if self._packed and is_fast(device, torch.bfloat16):
            self._tokens_step = TOKENS_STEP
            longest = self.text_model.input.limits.longest
            failure = failure_of(lambda: check_attention(self._asked, longest, device))
        failure = failure or self._try(batches, references, "bfloat16")
        if failure and self._packed:
            self._pack(on=False)
            log.warning("model %s runs in padded batches, as packed ones fail: %s", self._folder.name, failure)
            failure = self._try(batches, references, "bfloat16")
        if failure is None:
            return "bfloat16"
        if self._wanted_dtype == "bfloat16":
            raise ModelError(f"model {self._folder.name} cannot run in bfloat16: {failure}; use float32")
        log.warning("model %s runs in float32: %s", self._folder.name, failure)
        self._load(torch.device("cpu"))
        self._place(device)
        return "float32"

    def _try_packed(
        self, batches: Sequence[TokenBatch], references: Sequence[Vectors], precision: Precision
    ) -> str | None:
        try:
            self._pack(on=True)
        except CannotPack as error:
            return str(error)
        return self._try(batches, references, precision)

    def _try(self, batches: Sequence[TokenBatch], references: Sequence[Vectors], precision: Precision) -> str | None:
        """What is wrong with its vectors now, if anything."""
        return failure_of(lambda: require(compare(self._vectors(batches), references), precision))

    def _compile(self, batches: Sequence[TokenBatch], references: Sequence[Vectors], precision: Precision) -> None:
        """Run packed batches through compiled code with fewer kernels, if that works and vectors stay what they are."""
        device = torch.device(self.modules.device)
        try:
            with ExitStack() as undo, compiling(self.modules):
                fuse_projections(self.modules, undo)
                fuse_gelu(self.modules, undo, GPU_BATCH_TOKENS if device.type == "cuda" else None)
                _wait_for(device)
                require(compare(self._vectors(batches), references), precision)
                undo.pop_all()
        except CannotCompile as error:
            _wait_for(device)
            log.warning("model %s runs eagerly, as it cannot be compiled: %s", self._folder.name, error)
        else:
            self._compiled = True

    def _pack(self, *, on: bool) -> None:
        if on:
            self._packing.on()
        elif self._packed:
            self._packing.off()
        self._packed = on

    def _batch_tokens(self, device: torch.device) -> int:
        if device.type == "cuda" and self.text_model.input.kind is InputKind.PADDED:
            torch.cuda.empty_cache()  # what loading and checking left would count as taken
            free, _ = torch.cuda.mem_get_info(device)
            return find_budget(lambda tokens: self._probe(tokens, device), free)
        return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS

    def _probe(self, tokens: int, device: torch.device) -> Probe:
        """Seconds of a full batch of usual texts, and the most memory that these or one of the longest take."""
        usual, longest = (
            self.text_model.input.sample(max(1, tokens // row), row, next(iter(self.text_model.roles)))
            for row in (min(each, tokens, self.text_model.input.max_length) for each in (_USUAL_TOKENS, LONGEST_TRIED))
        )
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.run(longest)
        seconds = seconds_a_batch(lambda: self.run(usual), self._lanes.count)
        return Probe(seconds, torch.cuda.max_memory_allocated(device) - before)

    def _vectors(self, batches: Sequence[TokenBatch]) -> list[Vectors]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: TokenBatch) -> Vectors:
        if self._vocabulary is not None and len(batch.ids) and int(batch.ids.max()) >= self._vocabulary:
            # On a GPU this would end the process.
            raise ValueError(f"token {batch.ids.max()} is beyond the model's vocabulary of {self._vocabulary}")
        return self._run_packed(batch) if self._packed else self._launch(batch)

    def _run_packed(self, batch: TokenBatch) -> Vectors:
        """A text without tokens has no place in a packed batch: its vector is NaN."""
        kept = batch.lengths > 0
        if not kept.any():
            raise ValueError("the text has no token")
        full = fill_up(only(batch, kept), self._tokens_step, self.text_model.input.limits.longest)
        vectors = self._launch(full)
        if kept.all():
            return vectors[: len(batch)]
        whole = np.full((len(batch), vectors.shape[1]), np.nan, np.float32)
        whole[kept] = vectors[: int(kept.sum())]
        return whole

    def _launch(self, batch: TokenBatch) -> Vectors:
        return self._lanes.run(batch, lambda ids, starts: self._forward(batch, ids, starts))

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        features = self._features(batch, self.text_model.input, ids, starts)
        return sentence_vectors(self.modules, features, batch.role).float()

    def _features(
        self, batch: TokenBatch, text_input: TextInput, ids: torch.Tensor, starts: torch.Tensor
    ) -> dict[str, Any]:
        if text_input.kind is InputKind.FLAT:
            return flat_features(ids, starts)
        if self._packed:
            return packed_features(text_input, batch, ids, starts, self._first_position)
        return padded_features(text_input, batch, ids, starts)

    @torch.inference_mode()
    def _find_roles(self, text_input: TextInput) -> dict[Role, int]:
        """The roles that the model serves, with the dimensions of their vectors, from trying each."""
        roles: dict[Role, int] = {}
        refusals: list[str] = []
        for role in ROLE_PROMPTS:
            sample = text_input.sample(1, 1, role)
            ids, starts = torch.from_numpy(sample.ids), torch.from_numpy(sample.offsets)
            try:
                features = self._features(sample, text_input, ids, starts)
                roles[role] = sentence_vectors(self.modules, features, role).shape[1]
            except _REFUSALS as error:
                refusals.append(f"{type(error).__name__}: {error}")
        if not roles:
            raise ModelError(f"model {self._folder.name} cannot run: {refusals[0]}")
        if len(set(roles.values())) > 1:
            raise ModelError(f"model {self._folder.name} gives vectors of other dimensions for other roles: {roles}")
        return roles


def failure_of(run: Callable[[], object]) -> str | None:
    """What is wrong with the model as it runs now, if anything."""
    try:
        run()
    except (CheckFailed, CannotPack) as error:
        return str(error)
    except _REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    return None


def _wait_for(device: torch.device) -> None:
    """Until weights are where, and what, they should be: batches compute on another stream than these changes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def few_texts(model: TextModel, role: Role) -> TokenBatch:
    """Texts of different tokens and lengths."""
    limit = min(model.input.max_length, 24)
    tokens = model.input.tokenizer().encode(["one two three four five six", HARMLESS, "seven, eight and ten"], limit)
    return TokenBatch(tokens.ids, tokens.offsets, int(tokens.lengths.max()), 0, role)


def sentence_vectors(model: SentenceTransformer, features: dict[str, Any], role: Role) -> torch.Tensor:
    """All modules of a model, and its own cut to fewer dimensions: vectors [n, dim]."""
    features = {"modality": "text", "task": role, **features}
    vectors: torch.Tensor = model(features, task=role)["sentence_embedding"]
    if model.truncate_dim is not None:
        vectors = vectors[:, : model.truncate_dim]
        if is_normalized(model):
            vectors = torch.nn.functional.normalize(vectors, dim=1)
    return vectors


def _upcast(_module: torch.nn.Module, _inputs: Any, features: dict[str, Any]) -> dict[str, Any]:
    """What follows the transformer computes in float32."""
    return {name: upcast(value) for name, value in features.items()}
