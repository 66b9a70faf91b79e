"""Sparse vectors, scores of pairs and BGE-M3's three results, against the libraries that such models are made for.

Models of random weights: the time does not depend on these. Both sides run in this process, in turn, from texts to
results, loading excluded; each library at the best of some batch sizes, found on a part of the texts. FlagEmbedding is
compared if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import docstrings
from measure import machine, spread, table, timed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from engines.kinds import bge_m3
from engines.model_shapes import minilm_tokenizer, save_base
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.landing import landing
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import resolve_model

BATCHES = (8, 16, 32, 64)
LONGEST = 512
"""Tokens that the models take."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

Run = Callable[[Sequence[str]], object]


@dataclass(frozen=True)
class Pairing:
    """A model, as it runs here and by the library that it is made for."""

    name: str
    ours: Run
    theirs: Callable[[Sequence[str], int], object]


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}\n")
    texts = docstrings(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(pairing, texts, options.rounds) for pairing in pairings(Path(folder), texts)]
    print(table(["model", "the library, texts/s", "its batch", "embedstream, texts/s", "ratio"], rows))


def pairings(folder: Path, texts: Sequence[str]) -> list[Pairing]:
    """What is compared."""
    minilm = resolve_model(MINILM).path
    made = [splade(folder / "splade", minilm), reranker(folder / "reranker", minilm)]
    if importlib.util.find_spec("FlagEmbedding") is not None:
        made.append(flag_embedding(folder / "bge-m3", minilm, texts))
    return made


def splade(folder: Path, minilm: Path) -> Pairing:
    """MiniLM's shape with a head for each token of the vocabulary."""
    base = bert(folder / "base", minilm, transformers.AutoModelForMaskedLM)
    modules = [Transformer(base, transformer_task="fill-mask"), SpladePooling("max")]
    SparseEncoder(modules=modules, device="cpu").save(str(folder / "model"))
    reference: Any = SparseEncoder(str(folder / "model"), device="cpu")

    def theirs(texts: Sequence[str], batch: int) -> object:
        return reference.encode_document(list(texts), batch_size=batch)

    return Pairing("SPLADE, SparseEncoder", bare_loop(folder / "model"), theirs)


def reranker(folder: Path, minilm: Path) -> Pairing:
    """MiniLM's shape with one score; each text with the first line of another."""
    base = bert(folder, minilm, transformers.AutoModelForSequenceClassification, num_labels=1)
    reference: Any = CrossEncoder(base, device="cpu")

    def theirs(texts: Sequence[str], batch: int) -> object:
        return reference.predict(list(zip(queries(texts), texts, strict=True)), batch_size=batch)

    return Pairing("reranker, CrossEncoder", bare_loop(Path(base), pairs=True), theirs)


def flag_embedding(folder: Path, minilm: Path, texts: Sequence[str]) -> Pairing:
    """BGE-M3 with a quarter of its layers, as wide as they are."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 4096}
    model = bge_m3(folder, minilm, list(texts), LONGEST, **shape)
    from FlagEmbedding import BGEM3FlagModel

    reference = BGEM3FlagModel(str(model), use_fp16=False, devices="cpu")
    kinds = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}

    def theirs(texts: Sequence[str], batch: int) -> object:
        return reference.encode(list(texts), batch_size=batch, max_length=LONGEST, **kinds)

    return Pairing("BGE-M3 (6 of 24 layers), FlagEmbedding", bare_loop(model), theirs)


def bert(folder: Path, minilm: Path, head: Any, **settings: Any) -> str:
    """MiniLM's configuration and tokenizer with another head, of random weights."""
    config = transformers.AutoConfig.from_pretrained(minilm, **settings)
    return save_base(folder, config, minilm_tokenizer(minilm, LONGEST), head)


def queries(texts: Sequence[str]) -> list[str]:
    """The first line of the text before."""
    return [texts[at - 1].splitlines()[0] for at in range(len(texts))]


def bare_loop(folder: Path, pairs: bool = False) -> Run:
    """Our engine without anything around it."""
    engine = load_engine(EngineOptions(str(folder), trust=Trust(pickle=True)))
    info, tokenizer = engine.info, engine.tokenizer()

    def run(texts: Sequence[str]) -> object:
        tokens = tokenizer.encode(texts, info.max_length, queries(texts) if pairs else None)
        places = {kind: landing(kind, output, len(texts)) for kind, output in info.outputs.items()}
        for rows in cut_batches(tokens.lengths, info.batch_tokens, info.padded):
            found = engine.run(gather_batch(tokens, rows, 0, "document"))
            for kind, place in places.items():
                place.put(rows, found[kind])
        return [place.values() for place in places.values()]

    return run


def compare(pairing: Pairing, texts: Sequence[str], rounds: int) -> list[str]:
    """A line of the report."""
    sample = texts[:: max(1, len(texts) // 40)]
    pairing.ours(sample)
    best = min(BATCHES, key=lambda batch: timed(lambda: pairing.theirs(sample, batch)))
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds):
        both = [(ours, lambda: pairing.ours(texts)), (theirs, lambda: pairing.theirs(texts, best))]
        for taken, run in both if turn % 2 == 0 else reversed(both):
            taken.append(timed(run))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    paces = [spread([len(texts) / each for each in side]) for side in (theirs, ours)]
    return [pairing.name, paces[0], str(best), paces[1], f"{ratio:.2f}"]


if __name__ == "__main__":
    main()
