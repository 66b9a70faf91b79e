"""Sentence-transformers' own modules in torch, on padded batches."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from embedstream.errors import ModelError
from embedstream_worker.engines.base import (
    EngineInfo,
    OutOfMemory,
    OutputInfo,
    Role,
    TextTokenizer,
    TokenBatch,
)
from embedstream_worker.engines.checking import CheckFailed, Vectors, check_batches, compare, require
from embedstream_worker.engines.precision import Dtype, cpu_has_bfloat16
from embedstream_worker.engines.text_input import ROLE_PROMPTS, InputKind, TextInput, TextModel, warm_up_batches
from embedstream_worker.engines.torch_loading import excludes_prompt, is_normalized, load_model, read_input
from embedstream_worker.fingerprint import folder_fingerprint
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 2048
"""MiniLM on 2 cores: 1024 to 4096 are within 10 % of each other, 8192 takes 1.7 times as long (caches)."""

GPU_BATCH_TOKENS = 65_536
"""Enough to fill a large GPU with a small model; on out-of-memory the worker halves it."""


class TorchEngine:
    """Vectors equal to `encode_document` and `encode_query` of sentence-transformers, within the precision.

    In bfloat16 only the transformer computes in it; pooling and what follows stay in float32.
    """

    in_flight = 1

    def __init__(self, folder: ModelFolder, device: str = "auto", dtype: Dtype = "auto") -> None:
        self._folder = folder
        self._wanted_device = device
        self._wanted_dtype = dtype
        self._model: SentenceTransformer | None = None
        self._text_model: TextModel | None = None
        self._info: EngineInfo | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise RuntimeError("the engine is not started")
        return self._info

    @property
    def text_model(self) -> TextModel:
        """Everything of the started model but its weights."""
        if self._text_model is None:
            raise RuntimeError("the engine is not started")
        return self._text_model

    @property
    def modules(self) -> SentenceTransformer:
        """The started model itself."""
        if self._model is None:
            raise RuntimeError("the engine is not started")
        return self._model

    def start(self) -> None:
        """Load the model and try it. Raises `ModelError`."""
        device = _pick_device(self._wanted_device)
        dtype = _pick_dtype(self._wanted_dtype, device)
        # Beside a model on the CPU, tokenizing must not take more than its own thread; a user's own choice stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if device.type == "cpu" else "true")
        self._load(device)
        if dtype == "bfloat16":
            dtype = self._lower(device)
        model = self.text_model
        self._info = EngineInfo(
            engine="torch",
            device=str(device),
            dtype=dtype,
            fingerprint=folder_fingerprint(self._folder.path),
            max_length=model.input.max_length,
            padded=model.input.kind is InputKind.PADDED,
            batch_tokens=CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS,
            outputs={"embedding": OutputInfo(kind="dense", dim=model.dim, normalized=model.normalized)},
        )

    def warm_up(self, batch_tokens: int) -> float:
        """Run the smallest, the longest and the fullest batch that the budget allows; seconds taken."""
        begun = time.perf_counter()
        for batch in warm_up_batches(self.text_model, batch_tokens):
            self.embed(batch)
        return time.perf_counter() - begun

    def tokenizer(self) -> TextTokenizer:
        return self.text_model.input.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt as sentence-transformers picks it. Raises `ModelError`: see `TextModel.prompt`."""
        return self.text_model.prompt(role, prompt, prompt_name)

    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        """Vectors by output name, [n, dim], in the batch's order. Raises `OutOfMemory`."""
        try:
            return {"embedding": self._forward(batch)}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Out here the error's frames no longer hold the batch's tensors, so its memory can be had again.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(f"{len(batch)} texts of up to {batch.longest} tokens: {reason}")

    def close(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, device: torch.device) -> None:
        """In float32, and everything that there is to know about it."""
        self._model = load_model(self._folder, device)
        text_input = read_input(self._model, self._folder.name)
        self._text_model = TextModel(
            name=self._folder.name,
            input=text_input,
            prompts={name: str(prompt) for name, prompt in self._model.prompts.items()},
            default_prompt_name=self._model.default_prompt_name,
            roles=self._find_roles(text_input),
            normalized=is_normalized(self._model),
            excludes_prompt=excludes_prompt(self._model),
        )

    def _lower(self, device: torch.device) -> Dtype:
        """Let the transformer compute in bfloat16, if its vectors stay what they are; the dtype it is left in."""
        transformers = [part for part in self.modules.modules() if isinstance(part, Transformer)]
        if not transformers:
            return "float32"  # a table of vectors: nothing to compute
        batches = check_batches(self.text_model)
        references = self._vectors(batches)
        for transformer in transformers:
            transformer.to(torch.bfloat16)
            transformer.register_forward_hook(_upcast)
        try:
            require(compare(self._vectors(batches), references), "bfloat16")
        except (CheckFailed, RuntimeError) as error:
            if self._wanted_dtype == "bfloat16":
                raise ModelError(f"model {self._folder.name} cannot run in bfloat16: {error}; use float32") from error
            log.warning("model %s runs in float32: %s", self._folder.name, error)
            self._load(device)
            return "float32"
        return "bfloat16"

    def _vectors(self, batches: Sequence[TokenBatch]) -> list[Vectors]:
        return [self._forward(batch) for batch in batches]

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        features = self._features(batch, self.text_model.input, self.modules.device)
        return sentence_vectors(self.modules, features, batch.role).float().cpu().numpy()

    def _features(self, batch: TokenBatch, kind: TextInput, device: torch.device) -> dict[str, Any]:
        features: dict[str, Any] = {}
        if kind.kind is InputKind.FLAT:
            features["input_ids"] = _to_device(batch.ids.astype(np.int64), device)
            features["offsets"] = _to_device(batch.offsets[:-1], device)
            return features
        ids, mask = kind.pad(batch)
        features["input_ids"] = _to_device(ids, device)
        features["attention_mask"] = _to_device(mask, device)
        if kind.token_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        if batch.prompt_length:
            features["prompt_length"] = batch.prompt_length
        return features

    @torch.inference_mode()
    def _find_roles(self, kind: TextInput) -> dict[Role, int]:
        """The roles that the model serves, with the dimensions of their vectors, from trying each."""
        roles: dict[Role, int] = {}
        refusals: list[str] = []
        for role in ROLE_PROMPTS:
            features = self._features(kind.sample(1, 1, role), kind, self.modules.device)
            try:
                roles[role] = sentence_vectors(self.modules, features, role).shape[1]
            except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError) as error:
                refusals.append(f"{type(error).__name__}: {error}")
        if not roles:
            raise ModelError(f"model {self._folder.name} cannot run: {refusals[0]}")
        if len(set(roles.values())) > 1:
            raise ModelError(f"model {self._folder.name} gives vectors of other dimensions for other roles: {roles}")
        return roles


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
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
        for name, value in features.items()
    }


def _pick_dtype(wanted: Dtype, device: torch.device) -> Dtype:
    if wanted == "int8":
        raise ModelError("--dtype int8: torch does not compute in it; use --engine openvino, or another dtype")
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    return "float32"  # other devices: float32 until they are measured


def _pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(f"--device {wanted}: use auto, cpu, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(f"--device {wanted}: torch sees {count} CUDA devices here; use auto or cpu")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"--device {wanted}: torch sees no Apple GPU here; use auto or cpu")
    if device.type not in ("cpu", "mps"):
        raise ModelError(f"--device {wanted}: use auto, cpu, cuda:N or mps")
    return device


def _to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def is_out_of_memory(error: BaseException) -> bool:
    # MPS and the CPU's allocator have no exception type of their own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )
