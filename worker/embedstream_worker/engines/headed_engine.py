"""Models that give something else than one vector for each text, or more: in torch, in padded batches."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from embedstream.dataset.values import Ragged
from embedstream.errors import ModelError
from embedstream_worker.engines.base import EngineInfo, Results, TokenBatch
from embedstream_worker.engines.checking import check_batches
from embedstream_worker.engines.heads import FusedSplade, heads_of, sparse
from embedstream_worker.engines.out_of_memory import within_memory
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.text_engine import TextEngine
from embedstream_worker.engines.text_input import InputKind, TextModel
from embedstream_worker.engines.torch_device import pick_device, share_cores
from embedstream_worker.engines.torch_engine import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from embedstream_worker.engines.torch_features import padded_features, vocabulary_size
from embedstream_worker.engines.torch_loading import excludes_prompt, is_normalized, load_model, read_input
from embedstream_worker.families import card_prompts
from embedstream_worker.models import ModelFolder
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.purpose import Purpose
from embedstream_worker.recipe import origin_of

log = logging.getLogger(__name__)

_DIFFERENCE = 1e-4
"""How far a faster way may be off, in float32."""


class HeadedEngine(TextEngine):
    """Sparse vectors, a vector for each token, scores of pairs, labels: equal to what sentence-transformers gives.

    One pass through the model serves all kinds. In float32. Batches are of documents alone, as queries of such models
    often go another way: through modules of their own, or with tokens added.
    """

    def __init__(self, folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto") -> None:
        """Load the model and try it. Raises `ModelError`."""
        super().__init__()
        if dtype not in ("auto", "float32"):
            raise ModelError(f"--dtype {dtype}: model {folder.name} runs in float32; leave it out")
        place = pick_device(device)
        share_cores(place)
        self.modules: Any = load_model(folder, torch.device("cpu"))
        self._purpose = folder.purpose
        self._vocabulary = vocabulary_size(self.modules)
        self._fused: FusedSplade | None = None
        text_input = read_input(self.modules, folder.name, documents=True)
        if text_input.kind is not InputKind.PADDED:
            raise ModelError(f"model {folder.name} begins with a table of vectors, which gives no such results")
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
        )
        try:
            sample = self._forward(text_input.sample(2, 8, "document"))
            self._heads = heads_of(self.modules, self._purpose, folder.path, sample, self.text_model.normalized)
            self._try_heads(sample)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"model {folder.name} cannot run: {type(error).__name__}: {error}") from error
        self._fuse()
        self.modules.to(place)
        self.info = EngineInfo(
            engine="torch",
            device=str(place),
            dtype="float32",
            fingerprint=folder.fingerprint(),
            max_length=text_input.max_length,
            padded=True,
            batch_tokens=CPU_BATCH_TOKENS if place.type == "cpu" else GPU_BATCH_TOKENS // 8,
            pairs=pairs,
            origin=origin_of(folder),
            outputs={head.kind: head.info for head in self._heads},
            card_prompts=card_prompts(folder.name, folder.path),
        )

    @property
    def fused(self) -> bool:
        """Whether it runs SPLADE the faster way."""
        return self._fused is not None

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
                        return {"sparse": sparse(vectors)}
                    case Purpose.MULTIVECTOR:
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
        del self.modules, self._heads, self._fused
        gc.collect()

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """With the last layer of SPLADE in its place."""
        if self._fused is not None:
            self._fused.restore()
        try:
            yield
        finally:
            if self._fused is not None:
                self._fused.take()

    @torch.inference_mode()
    def _run(self, batch: TokenBatch) -> Results:
        if self._fused is not None:
            return {"sparse": sparse(self._fused(self._features(batch)), self.modules.max_active_dims)}
        features = self._forward(batch)
        wanted = [head for head in self._heads if batch.kinds is None or head.kind in batch.kinds]
        return cast("Results", {head.kind: head(features) for head in wanted})

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> dict[str, Any]:
        features = self._features(batch)
        given: dict[str, Any] = {"modality": "text", **features}
        if self._purpose is not Purpose.PAIRS:
            given["task"] = batch.role
            return {**features, **self.modules(given, task=batch.role)}
        return {**features, **self.modules(given)}

    def _features(self, batch: TokenBatch) -> dict[str, Any]:
        if self._vocabulary is not None and len(batch.ids) and int(batch.ids.max()) >= self._vocabulary:
            # On a GPU this would end the process.
            raise ValueError(f"token {batch.ids.max()} is beyond the model's vocabulary of {self._vocabulary}")
        device = next(self.modules.parameters()).device
        ids = torch.from_numpy(batch.ids).to(device)
        starts = torch.from_numpy(batch.offsets.astype(np.int32)).to(device)
        return padded_features(self.text_model.input, batch, ids, starts)

    @torch.inference_mode()
    def _try_heads(self, sample: dict[str, Any]) -> None:
        """A folder may not give what its files say. Raises `ValueError`, and what torch raises."""
        texts = len(sample["input_ids"])
        for head in self._heads:
            values = head(sample)
            fits = len(values) == texts and (isinstance(values, Ragged) or values.shape[1] == head.info.dim)
            if not fits:
                raise ValueError(f"it gives no {head.kind} of each text")

    def _fuse(self) -> None:
        """Run SPLADE the faster way, if its vectors stay what they are."""
        modules = [*self.modules.children()]
        if self._purpose is not Purpose.SPARSE or [*map(type, modules)] != [Transformer, SpladePooling]:
            return
        batches = check_batches(self.text_model)
        references = [self._run(batch)["sparse"] for batch in batches]
        try:
            fused = FusedSplade(*modules)
        except TypeError as error:
            log.info("model %s: its last layer is not fused: %s", self.text_model.name, error)
            return
        self._fused = fused
        try:
            off = max(_off(self._run(batch)["sparse"], ours) for batch, ours in zip(batches, references, strict=True))
        except (RuntimeError, ValueError, IndexError) as error:
            off = float("inf")
            log.info("model %s: %s", self.text_model.name, error)
        if off > _DIFFERENCE:
            fused.restore()
            self._fused = None
            name = self.text_model.name
            log.warning("model %s: its last layer is not fused, as weights would be off by %.2g", name, off)


def _off(ours: Ragged, theirs: Ragged) -> float:
    """The greatest difference between two sparse results."""
    assert ours.indices is not None
    assert theirs.indices is not None
    weights = [dict[tuple[int, int], float](), dict[tuple[int, int], float]()]
    for found, values in zip(weights, (ours, theirs), strict=True):
        rows = np.repeat(np.arange(len(values)), values.counts)
        assert values.indices is not None
        found.update(zip(zip(rows.tolist(), values.indices.tolist(), strict=True), values.values.tolist(), strict=True))
    one, other = weights
    return max((abs(one.get(place, 0.0) - other.get(place, 0.0)) for place in one.keys() | other.keys()), default=0.0)
