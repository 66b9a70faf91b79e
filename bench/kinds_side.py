"""One side of a comparison of `kinds.py`, in a process of its own: runs a model over texts when it is told to.

On standard input a JSON object, what to load; then one a line, what to run. On standard output an answer a line.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Run = Callable[[Sequence[str], int], object]


def main() -> None:
    """Answer until the input ends."""
    asked = json.loads(sys.stdin.readline())
    texts: list[str] = asked["texts"]
    run = SIDES[asked["side"]](asked["folder"])
    print(json.dumps("loaded"), flush=True)
    for line in sys.stdin:
        step = json.loads(line)
        begun = time.perf_counter()
        run(texts[:: step["every"]], step["batch"])
        print(json.dumps([time.perf_counter() - begun, peak_mib()]), flush=True)


def peak_mib() -> int:
    """The most memory that this process ever held."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) // 1024 if found else 0


def queries(texts: Sequence[str]) -> list[str]:
    """The first line of the text before."""
    return [texts[at - 1].splitlines()[0] for at in range(len(texts))]


def ours(folder: str) -> Run:
    """Our engine without anything around it, batches in flight as in a worker."""
    from embedstream_worker.batching import cut_batches, gather_batch
    from embedstream_worker.engines import EngineOptions, load_engine
    from embedstream_worker.landing import landing
    from embedstream_worker.model_folder import Trust

    engine = load_engine(EngineOptions(folder, trust=Trust(pickle=True)))
    info, tokenizer = engine.info, engine.tokenizer()

    def run(texts: Sequence[str], _: int) -> object:
        tokens = tokenizer.encode(texts, info.max_length, queries(texts) if info.pairs else None)
        places = {kind: landing(kind, output, len(texts)) for kind, output in info.outputs.items()}
        cut = cut_batches(tokens.lengths, info.batch_tokens, info.padded)
        with ThreadPoolExecutor(engine.in_flight) as threads:
            batches = (gather_batch(tokens, rows, 0, "document") for rows in cut)
            for rows, found in zip(cut, threads.map(engine.run, batches), strict=True):
                for kind, place in places.items():
                    place.put(rows, found[kind])
        return [place.values() for place in places.values()]

    return run


def sparse_encoder(folder: str) -> Run:
    from sentence_transformers import SparseEncoder

    model: Any = SparseEncoder(folder, device="cpu")
    return lambda texts, batch: model.encode_document(list(texts), batch_size=batch)


def cross_encoder(folder: str) -> Run:
    from sentence_transformers import CrossEncoder

    model: Any = CrossEncoder(folder, device="cpu")
    return lambda texts, batch: model.predict(list(zip(queries(texts), texts, strict=True)), batch_size=batch)


def flag_embedding(folder: str) -> Run:
    from FlagEmbedding import BGEM3FlagModel

    model: Any = BGEM3FlagModel(folder, use_fp16=False, devices="cpu")
    kinds = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    return lambda texts, batch: model.encode(list(texts), batch_size=batch, max_length=512, **kinds)


SIDES: dict[str, Callable[[str], Run]] = {
    "ours": ours,
    "SparseEncoder": sparse_encoder,
    "CrossEncoder": cross_encoder,
    "FlagEmbedding": flag_embedding,
}


if __name__ == "__main__":
    main()
