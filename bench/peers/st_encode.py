"""sentence-transformers' own `encode`. Arguments: model folder, texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peers.protocol import serve
from sentence_transformers import SentenceTransformer


class Encode:
    """Settings: `batch`, `threads` (null: torch's choice), `dtype`, `sorted` (by tokens, longest first)."""

    def __init__(self, folder: str) -> None:
        """`folder`: the model's."""
        self._folder = folder
        self._threads = torch.get_num_threads()
        self.tokens = self.computed = 0

    def configure(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"] or self._threads)
        self._model = self._load(settings["dtype"])
        self._model.register_forward_pre_hook(self._count)
        self._batch, self._sorted = settings["batch"], settings["sorted"]

    def _load(self, dtype: str) -> SentenceTransformer:
        return SentenceTransformer(self._folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        order = np.arange(len(texts))
        if self._sorted:
            lengths = [len(ids) for ids in self._model.tokenizer(list(texts), verbose=False)["input_ids"]]
            order = np.argsort(-np.array(lengths), kind="stable")
        # encode_document, as a corpus is what is embedded; it also puts a model's own prompt in front.
        found = self._model.encode_document(
            [texts[row] for row in order.tolist()], batch_size=self._batch, show_progress_bar=False
        )
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def _count(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        mask = inputs[0]["attention_mask"]
        self.computed += mask.numel()
        self.tokens += int(mask.sum())


if __name__ == "__main__":
    serve(Encode(sys.argv[1]))
