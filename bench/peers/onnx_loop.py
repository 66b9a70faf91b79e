"""A bare ONNX Runtime loop: tokenize, sort, cut by a token budget, run. Arguments: model folder, folder for the graph,
texts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peers.protocol import serve
from sentence_transformers import SentenceTransformer

Array = np.ndarray[Any, Any]


class Whole(torch.nn.Module):
    """All modules of a model, from ids and mask to vectors."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        vectors: torch.Tensor = self.model(features)["sentence_embedding"]
        return vectors


def export(model: SentenceTransformer, path: Path) -> None:
    """One graph, in float32, batch and length free."""
    ids = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        Whole(model).eval(),
        (ids, ids),
        str(path),
        dynamo=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["vectors"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "vectors": {0: "texts"}},
        opset_version=17,
    )


class Loop:
    """Settings: `threads` inside a run, `flying` runs at once, `tokens` in a batch."""

    def __init__(self, folder: str, graph: Path) -> None:
        model = SentenceTransformer(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
        if not graph.exists():
            graph.parent.mkdir(parents=True, exist_ok=True)
            export(model, graph)
        self._graph = graph
        self._tokenizer = model.tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(model.max_seq_length)
        self.tokens = self.computed = 0

    def configure(self, settings: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(self._graph), options, providers=["CPUExecutionProvider"])
        self._flying, self._budget = settings["flying"], settings["tokens"]

    def embed(self, texts: Sequence[str]) -> Array:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        lengths = np.array([len(row) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        cuts, start = [0], 0
        while start < len(order):
            start += max(1, self._budget // int(lengths[order[start]]))
            cuts.append(min(start, len(order)))
        batches = [order[a:b] for a, b in itertools.pairwise(cuts)]
        with ThreadPoolExecutor(self._flying) as pool:
            found = list(pool.map(lambda batch: self._run([rows[row] for row in batch]), batches))
        self.tokens += int(lengths.sum())
        self.computed += sum(int(lengths[batch].max()) * len(batch) for batch in batches)
        vectors = np.empty((len(texts), found[0].shape[1]), np.float32)
        for batch, part in zip(batches, found, strict=True):
            vectors[batch] = part
        return vectors

    def _run(self, rows: list[list[int]]) -> Array:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
            mask[at, : len(row)] = 1
        vectors: Array = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return vectors


serve(Loop(sys.argv[1], Path(sys.argv[2])))
