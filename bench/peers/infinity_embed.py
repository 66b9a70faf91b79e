"""Infinity's engine, in its own process, without its HTTP server. Arguments: model folder, texts."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.update(DO_NOT_TRACK="1", INFINITY_ANONYMOUS_USAGE_STATS="0", HF_HUB_OFFLINE="1")

import numpy as np
import torch
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from peers.protocol import serve
from sentence_transformers import SentenceTransformer


class Infinity:
    """Settings: `batch`, `dtype`, `compile`, `threads` (null: torch's choice)."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._threads = torch.get_num_threads()
        self._loop = asyncio.new_event_loop()
        self._engine: AsyncEmbeddingEngine | None = None
        self.tokens = self.computed = 0

    def configure(self, settings: dict[str, Any]) -> None:
        if self._engine is not None:
            self._loop.run_until_complete(self._engine.astop())
        torch.set_num_threads(settings["threads"] or self._threads)
        arguments = EngineArgs(
            model_name_or_path=self._folder,
            engine="torch",
            device="cpu",
            dtype=settings["dtype"],
            batch_size=settings["batch"],
            compile=settings["compile"],
            bettertransformer=False,
            model_warmup=False,
        )
        self._engine = AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(self._engine.astart())
        for model in gc.get_objects():
            if type(model).__mro__.count(SentenceTransformer):
                model[0].register_forward_pre_hook(self._count)  # Infinity calls `forward`, past the model's own hooks

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        assert self._engine is not None
        vectors, _usage = self._loop.run_until_complete(self._engine.embed(sentences=list(texts)))
        return np.stack(vectors)

    def _count(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        mask = inputs[0]["attention_mask"]
        self.computed += mask.numel()
        self.tokens += int(mask.sum())


serve(Infinity(sys.argv[1]))
