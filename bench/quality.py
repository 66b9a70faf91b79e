"""What a precision costs a search: nDCG@10 of float32, bf16 and int8 on queries whose answers are known.

A query is a definition of the standard library and the first line of its docstring, its answer the rest of that
docstring, among those of all others. ranx judges, in an environment of its own (`peers/ranx.txt`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contenders import Vectors
from environments import HERE, NotInstalled, python_of
from measure import machine, table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from stdlib_corpus import build

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.checking import compare
from embedstream_worker.engines.precision import Dtype

MODEL = "all-MiniLM-L6-v2"
PRECISIONS: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")
DEPTH = 10
SHORTEST_ANSWER = 60
"""Characters: less of a docstring is no text to be found by."""


@dataclass(frozen=True)
class Judged:
    """Queries, documents, and for each query the places of the documents that answer it."""

    queries: list[str]
    documents: list[str]
    answers: list[list[int]]


def judged(count: int) -> Judged:
    """Queries evenly drawn from all definitions with an answer; documents are the answers of all of them."""
    asked, documents = [], []
    for record in build(Path(sysconfig.get_path("stdlib")), False):
        first, _, rest = record["text"].partition("\n")
        if len(rest.strip()) >= SHORTEST_ANSWER:
            asked.append(f"{record['title'].rpartition('.')[2]} {first}")
            documents.append(rest.strip())
    places: dict[str, list[int]] = {}
    for place, document in enumerate(documents):
        places.setdefault(document, []).append(place)
    chosen = [place * len(asked) // count for place in range(min(count, len(asked)))]
    return Judged([asked[i] for i in chosen], documents, [places[documents[i]] for i in chosen])


def embed(engine: Engine, texts: Sequence[str]) -> Vectors:
    """Unit vectors [n, dim] in the order of the texts."""
    tokens = engine.tokenizer().encode(texts, engine.info.max_length)
    vectors = np.empty((len(texts), engine.info.outputs["dense"].dim), np.float32)
    for rows in cut_batches(tokens.lengths, engine.info.batch_tokens, padded=engine.info.padded):
        vectors[rows] = engine.run(gather_batch(tokens, rows, 0, "document"))["dense"]
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def run_of(queries: Vectors, documents: Vectors) -> list[dict[str, float]]:
    """For each query the best `DEPTH` documents, by place, and their scores."""
    scores = queries @ documents.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return [
        {str(place): float(score) for place, score in zip(places, row[places], strict=True)}
        for places, row in zip(best, scores, strict=True)
    ]


def ndcg(answers: Sequence[Sequence[int]], runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """nDCG@10 of each run, as ranx has it. Raises `NotInstalled`."""
    asked = {"answers": [{str(place): 1 for place in places} for places in answers], "runs": runs, "depth": DEPTH}
    done = subprocess.run(
        [str(python_of("ranx")), str(HERE / "peers" / "ranx_ndcg.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotInstalled((done.stderr.strip().splitlines() or ["ranx said nothing"])[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=600)
    chosen = parser.parse_args()
    print(f"{machine()}\n")
    task = judged(chosen.queries)
    vectors: dict[str, tuple[Vectors, Vectors]] = {}
    for precision in PRECISIONS:
        engine = load_engine(EngineOptions(MODEL, engine="openvino", dtype=precision))
        vectors[precision] = embed(engine, task.queries), embed(engine, task.documents)
        engine.close()
    found = ndcg(task.answers, {name: run_of(*pair) for name, pair in vectors.items()})
    rows = []
    for name, pair in vectors.items():
        agreement = compare(pair, vectors["float32"])
        lost = 100 * (1 - found[name] / found["float32"])
        rows.append([name, f"{found[name]:.4f}", f"{lost:.2f}", f"{agreement.lowest:.5f}", f"{agreement.mean:.5f}"])
    print(f"{len(task.queries):,} queries, {len(task.documents):,} documents, {MODEL}\n")
    print(table(["precision", f"nDCG@{DEPTH}", "lost, %", "cosine: min", "mean"], rows))


if __name__ == "__main__":
    main()
