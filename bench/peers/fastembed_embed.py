"""FastEmbed's `embed` of a model that is on this machine. Arguments: model folder, folder with its graph, texts.

Its hub is not asked: `specific_model_path` names a folder with a graph, which `st_onnx` leaves there, and a tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from peers.protocol import serve

NAME = "bench/model"


class FastEmbed:
    """Settings: `batch`, `threads` (null: its choice), `sorted` (by tokens, longest first)."""

    def __init__(self, model: Path, exported: Path) -> None:
        """`model`: a folder of a sentence transformer that pools by the mean and normalizes."""
        if not (exported / "onnx" / "model.onnx").exists():
            raise SystemExit(f"{exported}: no graph; st_onnx makes it")
        self._exported = exported
        dim = json.loads((model / "config.json").read_text("utf-8"))["hidden_size"]
        self._longest = json.loads((model / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"]
        TextEmbedding.add_custom_model(
            NAME, PoolingType.MEAN, True, ModelSource(hf=NAME), dim, model_file="onnx/model.onnx"
        )
        self.tokens = self.computed = 0

    def configure(self, settings: dict[str, Any]) -> None:
        self._batch, self._sorted = settings["batch"], settings["sorted"]
        self._model = TextEmbedding(NAME, threads=settings["threads"], specific_model_path=str(self._exported))
        # By itself it goes by `max_length` in tokenizer_config.json, which may be half of what the model is to take.
        self._model.model.tokenizer.enable_truncation(self._longest)
        self._tokenize = self._model.model.tokenize
        self._model.model.tokenize = self._counted

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        order = np.arange(len(texts))
        if self._sorted:
            tokens = self._tokenize(list(texts))
            order = np.argsort([-sum(each.attention_mask) for each in tokens], kind="stable")
        found = np.stack(list(self._model.embed([texts[row] for row in order.tolist()], batch_size=self._batch)))
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def _counted(self, documents: list[str], **options: Any) -> Any:
        tokens = self._tokenize(documents, **options)
        self.computed += sum(len(each) for each in tokens)
        self.tokens += sum(sum(each.attention_mask) for each in tokens)
        return tokens


if __name__ == "__main__":
    serve(FastEmbed(Path(sys.argv[1]), Path(sys.argv[2])))
