"""Models that give something else than one vector for each text, or more, in torch."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from embedstream.dataset.values import Ragged, Values
from embedstream.errors import ModelError
from embedstream.outputs import Kind
from embedstream_worker.engines.arrays import results_of
from embedstream_worker.engines.attention_check import check_attention
from embedstream_worker.engines.base import EngineInfo, Results, Role, TokenBatch, fitting
from embedstream_worker.engines.checking import CheckFailed, check, check_batches
from embedstream_worker.engines.heads import Features, SlicedSplade, Tensors, above_zero, heads_of
from embedstream_worker.engines.lowering import lower_below_heads
from embedstream_worker.engines.out_of_memory import within_memory
from embedstream_worker.engines.packed_attention import Asked, is_fast, noting
from embedstream_worker.engines.packed_base import PackedBase
from embedstream_worker.engines.packed_batch import TOKENS_STEP
from embedstream_worker.engines.precision import Dtype, Precision
from embedstream_worker.engines.text_engine import TextEngine
from embedstream_worker.engines.text_input import InputKind, TextModel
from embedstream_worker.engines.torch_device import pick_device, pick_dtype, share_cores
from embedstream_worker.engines.torch_engine import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    Batches,
    TorchEngine,
    failure_of,
    few_texts,
)
from embedstream_worker.engines.torch_features import padded_features, vocabulary_size
from embedstream_worker.engines.torch_loading import excludes_prompt, is_normalized, load_model, read_input
from embedstream_worker.families import card_prompts
from embedstream_worker.models import ModelFolder
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.purpose import Purpose
from embedstream_worker.recipe import origin_of

log = logging.getLogger(__name__)


class HeadedEngine(TextEngine):
    """Sparse vectors, a vector for each token, scores of pairs, labels: equal to what sentence-transformers gives.

    One pass through the model serves all kinds. In bfloat16 the transformer alone computes in it, heads stay in
    float32. Batches are of documents alone, as queries of such models often go another way: through modules of their
    own, or with tokens added. `batches` "auto" packs texts without padding, below the heads, on CUDA in bfloat16, if
    results stay what they are.
    """

    def __init__(
        self, folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto", batches: Batches = "auto"
    ) -> None:
        """Load the model and try it. Raises `ModelError`."""
        super().__init__(lambda: HeadedEngine(folder, "cpu", "float32"))
        place = pick_device(device)
        share_cores(place)
        self._folder = folder
        self.modules: Any = load_model(folder, torch.device("cpu")).requires_grad_(False)
        self._purpose = folder.purpose
        self._vocabulary = vocabulary_size(self.modules)
        self._sliced: SlicedSplade | None = None
        text_input = read_input(self.modules, folder.name, documents=True)
        if text_input.kind is not InputKind.PADDED:
            raise ModelError(f"model {folder.name} begins with a table of vectors, which gives no such results")
        self._base = PackedBase(self.modules, text_input)
        self._tokens_step = 1
        self._asked: set[Asked] = set()
        dense, pairs = self._purpose is Purpose.VECTORS, self._purpose is Purpose.PAIRS
        if pairs and self.modules.default_prompt_name is not None:
            raise ModelError(f"model {folder.name} puts a prompt in front of pairs, which is not supported")
        self.text_model = TextModel(
            name=folder.name,
            input=text_input,
            # `predict` takes none of a role.
            prompts={} if pairs else {name: str(prompt) for name, prompt in self.modules.prompts.items()},
            default_prompt_name=self.modules.default_prompt_name,
            roles={"document": 1, "query": 1} if dense else {"document": 1},
            normalized=dense and is_normalized(self.modules),
            excludes_prompt=excludes_prompt(self.modules),
            pairs=pairs,
        )
        try:
            sample = self._forward(text_input.sample(2, 8, "document"))
            self._heads = heads_of(self.modules, self._purpose, folder.path, sample, self.text_model.normalized)
            self._try_heads(sample)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"model {folder.name} cannot run: {type(error).__name__}: {error}") from error
        self._slice()
        lowers = pick_dtype(dtype, place) == "bfloat16"
        packs = batches == "packed" or (batches == "auto" and place.type == "cuda" and lowers)
        packs = packs and self._can_pack()
        precision = self._place(place, dtype, packs)
        outputs = {head.kind: head.info for head in self._heads}
        self.info = EngineInfo(
            engine="torch",
            device=str(place),
            dtype=precision,
            fingerprint=folder.fingerprint(),
            max_length=text_input.max_length,
            padded=True,
            batch_tokens=fitting(CPU_BATCH_TOKENS, outputs) if place.type == "cpu" else GPU_BATCH_TOKENS // 8,
            pairs=pairs,
            origin=origin_of(folder),
            outputs=outputs,
            card_prompts=card_prompts(folder.name, folder.path),
        )
        if place.type == "cuda":
            how = "packed below its heads" if self.packed else "padded"
            log.info("torch in %s on %s: batches of %d tokens, %s", precision, place, self.info.batch_tokens, how)

    @property
    def packed(self) -> bool:
        """Whether texts go through the transformer without padding."""
        return self._base.is_on

    @property
    def sliced(self) -> bool:
        """Whether it runs SPLADE without a matrix of all tokens and the vocabulary."""
        return self._sliced is not None

    def run(self, batch: TokenBatch) -> Results:
        """What the model gives, by kind, in the batch's order. Raises `OutOfMemory`."""
        return within_memory(batch, lambda: self._run(batch))

    @torch.inference_mode()
    def query(self, text: str, prompt: str | None) -> Results:
        """By the library's own `encode_query`; of BGE-M3, whose queries are no other texts, as a document.

        Not while another thread is in `run`. Raises `ModelError`.
        """
        prompt = replace(self.text_model, roles={"query": 1}).prompt("query", prompt, None)
        how: dict[str, Any] = {"prompt": prompt, "show_progress_bar": False}
        try:
            with panics_are_errors():
                match self._purpose:
                    case Purpose.SPARSE:
                        with self._as_loaded():
                            vectors = self.modules.encode_query([text], convert_to_sparse_tensor=False, **how)
                        return cast("Results", {"sparse": _values("sparse", above_zero(vectors), 1)})
                    case Purpose.MULTIVECTOR:
                        with self._as_loaded():
                            (tokens,) = self.modules.encode_query([text], convert_to_numpy=True, **how)
                        return {"multivector": Ragged(np.array([len(tokens)]), tokens.astype(np.float32))}
                    case Purpose.VECTORS:
                        ids = self.tokenizer().encode([prompt + text], self.info.max_length)
                        length = self.tokenizer().prompt_length(prompt, self.info.max_length)
                        return self.run(TokenBatch(ids.ids, ids.offsets, len(ids.ids), length, "document"))
        except Exception as error:  # whatever the model's own way raises, the user gets one sentence
            raise ModelError(f"the query cannot be embedded: {type(error).__name__}: {error}") from error
        raise ModelError(f"model {self.text_model.name} scores pairs and labels, which are not searched")

    def close(self) -> None:
        """Give the model's memory back."""
        super().close()
        del self.modules, self._heads, self._sliced, self._base
        gc.collect()

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """With the last layer of SPLADE in its place, and in padded batches."""
        with self._base.paused():
            if self._sliced is not None:
                self._sliced.restore()
            try:
                yield
            finally:
                if self._sliced is not None:
                    self._sliced.take()

    def tensors(self, features: Features, role: Role) -> Tensors:
        """All that it gives for a padded batch, from ids and masks: kind by kind, as `arrays.results_of` takes it."""
        return self.finish(self._compute(features, role))

    def finish(self, computed: Features) -> Tensors:
        """The same from what the modules computed."""
        return tuple(tensor for head in self._heads for tensor in head(computed))

    @torch.inference_mode()
    def _run(self, batch: TokenBatch) -> Results:
        features = self._forward(batch)
        wanted = [head for head in self._heads if batch.kinds is None or head.kind in batch.kinds]
        return cast("Results", {head.kind: _values(head.kind, head(features), len(batch)) for head in wanted})

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> Features:
        if self._vocabulary is not None and len(batch.ids) and int(batch.ids.max()) >= self._vocabulary:
            # On a GPU this would end the process.
            raise ValueError(f"token {batch.ids.max()} is beyond the model's vocabulary of {self._vocabulary}")
        device = next(self.modules.parameters()).device
        ids = torch.from_numpy(batch.ids).to(device)
        starts = torch.from_numpy(batch.offsets.astype(np.int32)).to(device)
        features = padded_features(self.text_model.input, batch, ids, starts)
        if not self.packed:
            return self._compute(features, batch.role)
        with self._base.batch(batch, starts, self._tokens_step):
            return self._compute(features, batch.role)

    def _compute(self, features: Features, role: Role) -> Features:
        """What the heads need."""
        if self._sliced is not None:
            return {**features, "sentence_embedding": self._sliced(features)}
        given: Features = {"modality": "text", **features}
        if self._purpose is not Purpose.PAIRS:
            given["task"] = role
            return {**features, **self.modules(given, task=role)}
        return {**features, **self.modules(given)}

    @torch.inference_mode()
    def _try_heads(self, sample: Features) -> None:
        """A folder may not give what its files say. Raises `ValueError`, and what torch raises."""
        texts = len(sample["input_ids"])
        for head in self._heads:
            values = _values(head.kind, head(sample), texts)
            fits = len(values) == texts and (isinstance(values, Ragged) or values.shape[1] == head.info.dim)
            if not fits:
                raise ValueError(f"it gives no {head.kind} of each text")

    def _can_pack(self) -> bool:
        """Whether packing leaves a few short texts their results: on the CPU, where a model that reads beyond its
        tables raises an error. On a GPU that would end the process.
        """
        batches = [few_texts(self.text_model, role) for role in self.text_model.roles]
        references = [self._run(batch) for batch in batches]
        with noting() as self._asked:
            packs = self._pack(batches, references)
        self._base.off()
        return packs

    def _pack(self, batches: Sequence[TokenBatch], references: Sequence[Results]) -> bool:
        """Run packed batches, if results stay what they are."""

        def try_packed() -> None:
            self._base.on()
            check([self._run(batch) for batch in batches], references, "float32")

        if failure := failure_of(try_packed):
            self._base.off()
            log.warning("model %s runs in padded batches, as it cannot be packed: %s", self.text_model.name, failure)
        return failure is None

    def _place(self, place: torch.device, wanted: Dtype, packs: bool) -> Precision:
        """Bring it to its device, and into packed batches and bfloat16, if that is right and the latter faster; the
        dtype it is in.
        """
        self._move(place)
        lowers = pick_dtype(wanted, place) == "bfloat16"
        if not lowers and not packs:
            return "float32"
        batches = check_batches(self.text_model)
        references = [self._run(batch) for batch in batches]
        exact = _seconds(lambda: self._run(batches[0])) if lowers else 0.0
        if packs:
            self._pack(batches, references)
        if not lowers:
            return "float32"
        name = self.text_model.name
        try:
            with self._as_loaded():
                lower_below_heads(self.modules)
            self._check_lowered(batches, references, place)
            if wanted == "bfloat16" or _seconds(lambda: self._run(batches[0])) < exact:
                return "bfloat16"
            failure = "bfloat16 is no faster here"
        except (CheckFailed, RuntimeError, ValueError, TypeError, AttributeError) as error:
            failure = str(error)
            if wanted == "bfloat16":
                raise ModelError(f"model {name} cannot run in bfloat16: {failure}; use float32") from error
        log.info("model %s runs in float32: %s", name, failure)
        self.modules, self._sliced = load_model(self._folder, torch.device("cpu")).requires_grad_(False), None
        self._base = PackedBase(self.modules, self.text_model.input)
        self._slice()
        self._move(place)
        return "float32"

    def _check_lowered(self, batches: Sequence[TokenBatch], references: Sequence[Results], place: torch.device) -> None:
        """In padded batches if packed ones fail. Raises `CheckFailed`, and what models raise."""

        def try_lowered() -> None:
            if self.packed and is_fast(place, torch.bfloat16):
                self._tokens_step = TOKENS_STEP
                check_attention(self._asked, self.text_model.input.limits.longest, place)
            check([self._run(batch) for batch in batches], references, "bfloat16")

        if self.packed and (failure := failure_of(try_lowered)):
            self._base.off()
            log.warning("model %s runs in padded batches, as packed ones fail: %s", self.text_model.name, failure)
        if not self.packed:
            try_lowered()

    def _move(self, place: torch.device) -> None:
        with self._as_loaded():  # its last layer, too
            self.modules.to(place)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    def _slice(self) -> None:
        """Run SPLADE a slice of the vocabulary at a time, if its vectors stay what they are."""
        modules: list[Any] = [*self.modules.children()]
        if len(modules) == 1 and isinstance(modules[0], Router) and "document" in modules[0].sub_modules:
            modules = [*modules[0].sub_modules["document"].children()]
        if [*map(type, modules)] != [Transformer, SpladePooling]:
            return
        batches = check_batches(self.text_model)
        references = [self._run(batch) for batch in batches]
        transformer, pooling = modules
        try:
            self._sliced = SlicedSplade(transformer, pooling, self.text_model.input.padding_side)
        except TypeError as error:
            log.info("model %s: its vocabulary is not sliced: %s", self.text_model.name, error)
            return
        try:
            check([self._run(batch) for batch in batches], references, "float32")
        except (CheckFailed, RuntimeError, ValueError, IndexError) as error:
            self._sliced.restore()
            self._sliced = None
            log.warning("model %s: its vocabulary is not sliced: %s", self.text_model.name, error)


def load_torch(
    folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto", compiles: bool = False
) -> TorchEngine | HeadedEngine:
    """A model in torch, whatever it gives. Raises `ModelError`."""
    if folder.headed:
        if compiles:
            log.warning("model %s runs eagerly, as only models of one dense vector are compiled", folder.name)
        return HeadedEngine(folder, device, dtype)
    return TorchEngine(folder, device, dtype, compiles=compiles)


def _seconds(run: Callable[[], object]) -> float:
    """Of the faster of two runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _values(kind: Kind, tensors: Tensors, texts: int) -> Values:
    return results_of(kind, [tensor.cpu().numpy() for tensor in tensors], texts)
