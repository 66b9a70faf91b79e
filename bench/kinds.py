"""Sparse vectors, scores of pairs and BGE-M3's three results, against the libraries that such models are made for.

Models of random weights: the time does not depend on these. Each side runs in a process of its own, and both take
turns, from texts to results, loading excluded; each library at the best of some batch sizes, found on a part of the
texts. FlagEmbedding is compared if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import docstrings
from measure import machine, spread, table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from engines.kinds import bge_m3
from engines.model_shapes import minilm_tokenizer, save_base
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from embedstream_worker.models import resolve_model

BATCHES = (8, 16, 32, 64)
LONGEST = 512
"""Tokens that the models take."""

SAMPLE = 40
"""Texts by which a batch size is chosen."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Pairing:
    """A model, and the library that it is made for."""

    name: str
    library: str
    make: Callable[[Path, Sequence[str]], Path]


class Side:
    """A process that runs a model."""

    def __init__(self, process: subprocess.Popen[str], texts: Sequence[str]) -> None:
        self._process = process
        self._every = max(1, len(texts) // SAMPLE)
        self.peak_mib = 0

    def seconds(self, batch: int, sample: bool = False) -> float:
        """Of one run over the texts, or over some of them."""
        seconds, self.peak_mib = self.ask({"batch": batch, "every": self._every if sample else 1})
        return float(seconds)

    def ask(self, question: object) -> Any:
        """Its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="models whose name contains this")
    options = parser.parse_args()
    print(f"{machine()}\n")
    texts = docstrings(options.texts)
    head = ["model", "the library, texts/s", "its batch", "its peak, MiB", "embedstream, texts/s", "peak, MiB", "ratio"]
    with tempfile.TemporaryDirectory() as folder:
        chosen = [each for each in PAIRINGS if (options.only or "") in each.name]
        here = [each for each in chosen if each.library != "FlagEmbedding" or importlib.util.find_spec(each.library)]
        print(table(head, [compare(each, Path(folder), texts, options.rounds) for each in here]))


def splade(folder: Path, _: Sequence[str]) -> Path:
    """MiniLM's shape with a head for each token of the vocabulary."""
    base = bert(folder / "base", transformers.AutoModelForMaskedLM)
    modules = [Transformer(base, transformer_task="fill-mask"), SpladePooling("max")]
    SparseEncoder(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def reranker(folder: Path, _: Sequence[str]) -> Path:
    """MiniLM's shape with one score; each text with the first line of another."""
    return Path(bert(folder, transformers.AutoModelForSequenceClassification, num_labels=1))


def quarter_of_bge_m3(folder: Path, texts: Sequence[str]) -> Path:
    """BGE-M3 with a quarter of its layers, as wide as they are."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 4096}
    return bge_m3(folder, resolve_model(MINILM).path, list(texts), LONGEST, **shape)


def bert(folder: Path, head: Any, **settings: Any) -> str:
    """MiniLM's configuration and tokenizer with another head, of random weights."""
    minilm = resolve_model(MINILM).path
    config = transformers.AutoConfig.from_pretrained(minilm, **settings)
    return save_base(folder, config, minilm_tokenizer(minilm, LONGEST), head)


PAIRINGS = (
    Pairing("SPLADE", "SparseEncoder", splade),
    Pairing("reranker", "CrossEncoder", reranker),
    Pairing("BGE-M3 (6 of 24 layers)", "FlagEmbedding", quarter_of_bge_m3),
)


@contextmanager
def side(name: str, folder: Path, texts: Sequence[str]) -> Iterator[Side]:
    """Loaded, in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "kinds_side.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        made = Side(process, texts)
        made.ask({"side": name, "folder": str(folder), "texts": list(texts)})
        yield made
        assert process.stdin is not None
        process.stdin.close()


def compare(pairing: Pairing, made: Path, texts: Sequence[str], rounds: int) -> list[str]:
    """A line of the report. `made`: where models are put."""
    folder = pairing.make(made / pairing.library, texts)
    ours: list[float] = []
    theirs: list[float] = []
    with side("ours", folder, texts) as our, side(pairing.library, folder, texts) as their:
        our.seconds(0, sample=True)
        their.seconds(BATCHES[0], sample=True)
        best = min(BATCHES, key=lambda batch: their.seconds(batch, sample=True))
        for turn in range(rounds):
            both = [(ours, our, 0), (theirs, their, best)]
            for taken, runner, batch in both if turn % 2 == 0 else reversed(both):
                taken.append(runner.seconds(batch))
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        paces = [spread([len(texts) / each for each in taken], 1) for taken in (theirs, ours)]
        name = f"{pairing.name}, {pairing.library}"
        return [name, paces[0], str(best), f"{their.peak_mib:,}", paces[1], f"{our.peak_mib:,}", f"{ratio:.2f}"]


if __name__ == "__main__":
    main()
