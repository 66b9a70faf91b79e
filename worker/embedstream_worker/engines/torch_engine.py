"""Sentence-transformers' own modules in torch, on padded batches."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer

from embedstream.errors import ModelError
from embedstream_worker.engines.base import (
    EngineInfo,
    OutOfMemory,
    OutputInfo,
    Role,
    TextTokenizer,
    TokenBatch,
)
from embedstream_worker.engines.torch_loading import InputKind, TextInput, is_normalized, load_model, read_input
from embedstream_worker.fingerprint import folder_fingerprint
from embedstream_worker.models import ModelFolder

CPU_BATCH_TOKENS = 2048
"""MiniLM on 2 cores: 1024 to 4096 are within 10 % of each other, 8192 takes 1.7 times as long (caches)."""

GPU_BATCH_TOKENS = 65_536
"""Enough to fill a large GPU with a small model; on out-of-memory the worker halves it."""

_WARM_ROW_TOKENS = 64  # a usual short text: many rows at once

_ROLE_PROMPTS: dict[Role, tuple[str, ...]] = {
    "document": ("document", "passage", "corpus"),
    "query": ("query",),
}
"""Names under which `encode_document` and `encode_query` look for their prompt, in their order."""


class TorchEngine:
    """Vectors equal to `encode_document` and `encode_query` of sentence-transformers, in float32."""

    in_flight = 1

    def __init__(self, folder: ModelFolder, device: str = "auto") -> None:
        self._folder = folder
        self._wanted_device = device
        self._model: SentenceTransformer | None = None
        self._input: TextInput | None = None
        self._info: EngineInfo | None = None
        self._roles: dict[Role, int] = {}  # those that the model serves, with the dimensions of their vectors

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise RuntimeError("the engine is not started")
        return self._info

    def start(self) -> None:
        """Load the model and try it. Raises `ModelError`."""
        device = _pick_device(self._wanted_device)
        # Beside a model on the CPU, tokenizing must not take more than its own thread; a user's own choice stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if device.type == "cpu" else "true")
        self._model = load_model(self._folder, device)
        self._input = read_input(self._model, self._folder.name)
        self._roles = self._find_roles()
        self._info = EngineInfo(
            engine="torch",
            device=str(device),
            dtype="float32",
            fingerprint=folder_fingerprint(self._folder.path),
            max_length=self._input.max_length,
            padded=self._input.kind is InputKind.PADDED,
            batch_tokens=CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS,
            outputs={
                "embedding": OutputInfo(
                    kind="dense", dim=self._roles[next(iter(self._roles))], normalized=is_normalized(self._model)
                )
            },
        )

    def warm_up(self, batch_tokens: int) -> float:
        """Run the smallest, the longest and the fullest batch that the budget allows; seconds taken."""
        begun = time.perf_counter()
        longest = max(1, min(self.info.max_length, batch_tokens))
        short = min(_WARM_ROW_TOKENS, longest)
        for rows, tokens in (
            (1, 1),
            (max(1, batch_tokens // longest), longest),
            (max(1, batch_tokens // short), short),
        ):
            for role in self._roles:
                self.embed(self._sample(rows, tokens, role))
        return time.perf_counter() - begun

    def tokenizer(self) -> TextTokenizer:
        return self._started_input.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        """The prompt as sentence-transformers picks it; an explicit empty one is none.

        Order: `prompt`, `prompt_name`, the role's own, the model's default.

        Raises:
            ModelError: the model has no prompt of that name, or does not serve the role.
        """
        model = self._started_model
        if role not in self._roles:
            raise ModelError(f"model {self._folder.name} has no route for --role {role}")
        if prompt is not None:
            return prompt
        if prompt_name is not None:
            if prompt_name not in model.prompts:
                known = ", ".join(sorted(model.prompts)) or "none"
                raise ModelError(f"model {self._folder.name} has no prompt {prompt_name!r} (it has: {known})")
            return str(model.prompts[prompt_name])
        for name in (*_ROLE_PROMPTS[role], model.default_prompt_name):
            if name in model.prompts:
                return str(model.prompts[name])
        return ""

    def embed(self, batch: TokenBatch) -> dict[str, npt.NDArray[np.float32]]:
        """Vectors by output name, [n, dim], in the batch's order. Raises `OutOfMemory`."""
        try:
            return {"embedding": self._forward(batch)}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
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

    @property
    def _started_model(self) -> SentenceTransformer:
        if self._model is None:
            raise RuntimeError("the engine is not started")
        return self._model

    @property
    def _started_input(self) -> TextInput:
        if self._input is None:
            raise RuntimeError("the engine is not started")
        return self._input

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        model = self._started_model
        features = self._features(batch, model.device)
        vectors: torch.Tensor = model(features, task=batch.role)["sentence_embedding"]
        if model.truncate_dim is not None:
            vectors = vectors[:, : model.truncate_dim]
            if is_normalized(model):
                vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors.float().cpu().numpy()

    def _features(self, batch: TokenBatch, device: torch.device) -> dict[str, Any]:
        kind = self._started_input
        features: dict[str, Any] = {"modality": "text", "task": batch.role}
        if kind.kind is InputKind.FLAT:
            features["input_ids"] = _to_device(batch.ids.astype(np.int64), device)
            features["offsets"] = _to_device(batch.offsets[:-1], device)
            return features
        places = np.arange(batch.longest)
        lengths = batch.lengths[:, None]
        mask = places >= batch.longest - lengths if kind.padding_side == "left" else places < lengths
        ids = np.full(mask.shape, kind.pad_id, np.int64)
        ids[mask] = batch.ids
        features["input_ids"] = _to_device(ids, device)
        features["attention_mask"] = _to_device(mask.astype(np.int64), device)
        if kind.token_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        if batch.prompt_length:
            features["prompt_length"] = batch.prompt_length
        return features

    def _find_roles(self) -> dict[Role, int]:
        """The roles that the model serves, with the dimensions of their vectors, from trying each."""
        roles: dict[Role, int] = {}
        refusals: list[str] = []
        for role in _ROLE_PROMPTS:
            try:
                roles[role] = self._forward(self._sample(1, 1, role)).shape[1]
            except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError) as error:
                refusals.append(f"{type(error).__name__}: {error}")
        if not roles:
            raise ModelError(f"model {self._folder.name} cannot run: {refusals[0]}")
        if len(set(roles.values())) > 1:
            raise ModelError(f"model {self._folder.name} gives vectors of other dimensions for other roles: {roles}")
        return roles

    def _sample(self, rows: int, tokens: int, role: Role) -> TokenBatch:
        """Rows of at least one text token, from the model's own tokenizer."""
        text = self.tokenizer().encode(["a"], self._started_input.max_length).ids
        tokens = max(tokens, len(text), 1)
        row = np.resize(text, tokens) if len(text) else np.zeros(tokens, np.int32)
        return TokenBatch(np.tile(row, rows), np.arange(rows + 1, dtype=np.int64) * tokens, tokens, 0, role)


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


def _is_out_of_memory(error: BaseException) -> bool:
    # MPS and the CPU's allocator have no exception type of their own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )
