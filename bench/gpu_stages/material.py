"""What is embedded, and with what: real text cut to lengths, MiniLM, models of real shapes with random weights.

Random weights compute as fast as trained ones; only what the vectors mean is missing. All models have MiniLM's
tokenizer, so tokenizing costs what it costs in earnest, and as many rows in their table of words as it has tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from corpora import docstrings
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer

from embedstream.errors import ModelError
from embedstream_worker.models import resolve_model
from gpu_stages.context import Bench

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LONGEST = 512
MEAN_TOKENS = 128
SPREAD = 0.8
"""Of the logarithms: a twentieth of the texts is beyond 300 tokens, a twentieth below 25."""

_FEW = 60

Vectors = npt.NDArray[np.float32]
Lengths = npt.NDArray[np.int64]

# What `gpu_pack.py` puts into its folder

MODEL = "minilm"
"""The model's folder, with its weights in `WEIGHTS` instead of safetensors."""
WEIGHTS = "weights.npz"
"""Each tensor in bfloat16, its upper and its lower bytes apart, as only the upper ones can be compressed."""
TEXTS = "texts.json"
VECTORS = "vectors.npy"
"""Those of the texts, [n, 384], in float32 by sentence-transformers, from the model's full weights."""

_UPPER, _LOWER = "upper/", "lower/"


def pack_weights(safetensors: Path, packed: Path) -> None:
    """Write a model's weights rounded to bfloat16, in two thirds of their bytes."""
    planes: dict[str, npt.NDArray[np.uint8]] = {}
    for name, tensor in load_file(safetensors).items():
        if tensor.dtype == np.float32:  # positions' numbers are no weights
            rounded = torch.from_numpy(tensor).to(torch.bfloat16).view(torch.int16).numpy()
            both = rounded.reshape(-1).view(np.uint8).reshape(-1, 2)
            shape = np.array(tensor.shape, np.int32).view(np.uint8)
            planes |= {f"shape/{name}": shape, _LOWER + name: both[:, 0], _UPPER + name: both[:, 1]}
    np.savez_compressed(packed, **planes)  # type: ignore[arg-type]  # its only named argument is no array


def unpack_weights(packed: Path, safetensors: Path) -> None:
    """Write what `pack_weights` kept as a file in float32."""
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    with np.load(packed, allow_pickle=False) as planes:
        for key in planes.files:
            if key.startswith(_UPPER):
                name = key.removeprefix(_UPPER)
                bits = planes[key].astype(np.uint32) << 24 | planes[_LOWER + name].astype(np.uint32) << 16
                tensors[name] = bits.view(np.float32).reshape(planes[f"shape/{name}"].view(np.int32))
    save_file(tensors, safetensors, metadata={"format": "pt"})


def minilm(bench: Bench) -> Path:
    """The real model's folder: brought, or of an installed package. Raises `SystemExit` if there is neither."""
    brought = bench.brought / MODEL
    if not brought.is_dir():
        try:
            return resolve_model(MINILM).path
        except ModelError as error:
            raise SystemExit(
                f"no model in {brought} (bench/gpu_pack.py makes it), and none installed: {error}"
            ) from error

    def make(folder: Path) -> None:
        shutil.copytree(brought, folder, ignore=shutil.ignore_patterns(WEIGHTS))
        unpack_weights(brought / WEIGHTS, folder / "model.safetensors")

    return _once(bench.scratch / MODEL, make)


def reference_vectors(bench: Bench) -> tuple[list[str], Vectors]:
    """Texts, and their vectors in float32, [n, 384]: those brought, or computed here. With `tiny` few, short ones."""
    if (bench.brought / VECTORS).exists():
        texts = json.loads((bench.brought / TEXTS).read_text("utf-8"))
        vectors: Vectors = np.load(bench.brought / VECTORS, allow_pickle=False)
        return (texts[:_FEW], vectors[:_FEW]) if bench.tiny else (texts, vectors)
    texts = sample_texts()[: _FEW if bench.tiny else None]
    model = SentenceTransformer(str(minilm(bench)), device=str(bench.device), local_files_only=True)
    return texts, model.encode(texts, batch_size=32, show_progress_bar=False)


def sample_texts(count: int = 500) -> list[str]:
    """Docstrings of all lengths, among them the longest, and texts of one token."""
    found = sorted(docstrings(), key=len)
    few = ["a", "the", "?"]
    longest = found[-20:]
    usual = found[:-20]
    wanted = count - len(few) - len(longest)
    return [*few, *(usual[i * len(usual) // wanted] for i in range(wanted)), *longest]


class RealText:
    """Running text, cut wherever a length asks for it."""

    def __init__(self, bench: Bench) -> None:
        self._words = _running_text(bench).split()
        tokenizer = Tokenizer.from_file(str(minilm(bench) / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        unlike = list(dict.fromkeys(self._words))
        sizes = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(unlike, add_special_tokens=False)]
        of_word = dict(zip(unlike, sizes, strict=True))
        self._ends = np.cumsum([of_word[word] for word in self._words])

    def cut(self, lengths: Lengths, seed: int = 0) -> list[str]:
        """Texts of about these lengths in tokens, two special tokens included, from places drawn by the seed."""
        wanted = np.maximum(lengths - 2, 1)
        first = np.random.default_rng(seed).integers(0, self._ends[-1] - wanted.max(), len(wanted))
        starts = np.searchsorted(self._ends, first)
        stops = np.searchsorted(self._ends, self._ends[starts] + wanted)
        return [" ".join(self._words[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def _running_text(bench: Bench) -> str:
    """The standard library's docstrings, which take seconds to find, one after the other."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "text").write_text("\n".join(docstrings()), "utf-8")

    return (_once(bench.scratch / "docstrings", make) / "text").read_text("utf-8")


def lognormal_lengths(tokens: int, seed: int = 0) -> Lengths:
    """Lengths that add up to about so many tokens, around `MEAN_TOKENS`."""
    count = max(1, tokens // MEAN_TOKENS)
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, count))
    return np.clip(lengths, 3, LONGEST).astype(np.int64)


@dataclass(frozen=True)
class Shape:
    """A model as its name says, without its weights."""

    name: str
    kind: Callable[..., transformers.PretrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"

    def config(self, vocabulary: int, tiny: bool) -> transformers.PretrainedConfig:
        """`tiny`: two narrow layers."""
        settings = self.settings | {"vocab_size": vocabulary, "pad_token_id": 0}
        if tiny:
            settings |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
        return self.kind(**settings)


BERT_BASE = Shape("BERT-base", transformers.BertConfig)
MINILM_L6 = Shape(
    "MiniLM-L6",
    transformers.BertConfig,
    {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
)
MODERNBERT_BASE = Shape(
    "ModernBERT-base",
    transformers.ModernBertConfig,
    {"bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102},
)
XLMR_LARGE = Shape(
    "XLM-R-large",
    transformers.XLMRobertaConfig,
    {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    pooling="cls",
)


def random_model(bench: Bench, shape: Shape) -> Path:
    """A folder of sentence-transformers: the transformer, MiniLM's tokenizer, pooling, normalizing."""

    def make(folder: Path) -> None:
        transformer = Transformer(str(_base(bench, shape, folder / "base", transformers.AutoModel)))
        pooling = Pooling(transformer.get_embedding_dimension(), shape.pooling)
        whole = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
        whole.max_seq_length = LONGEST
        whole.save(str(folder / "model"), create_model_card=False)
        shutil.rmtree(folder / "base")

    return _once(bench.scratch / shape.name, make) / "model"


def random_splade(bench: Bench) -> Path:
    """A folder of a sparse encoder of BERT-base's size."""

    def make(folder: Path) -> None:
        base = _base(bench, BERT_BASE, folder / "base", transformers.AutoModelForMaskedLM)
        modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling("max")]
        SparseEncoder(modules=modules, device="cpu").save(str(folder / "model"), create_model_card=False)
        shutil.rmtree(base)

    return _once(bench.scratch / "splade", make) / "model"


def random_reranker(bench: Bench) -> Path:
    """A folder of a reranker of BERT-base's size."""

    def make(folder: Path) -> None:
        head = transformers.AutoModelForSequenceClassification
        _base(bench, BERT_BASE, folder / "model", head, num_labels=1)

    return _once(bench.scratch / "reranker", make) / "model"


def random_three(bench: Bench) -> Path:
    """A folder of BERT-base with BGE-M3's heads beside its one vector."""

    def make(folder: Path) -> None:
        shutil.copytree(random_model(bench, BERT_BASE), folder / "model")
        width = BERT_BASE.config(1, bench.tiny).hidden_size
        for name, outputs in (("sparse", 1), ("colbert", width)):
            torch.save(torch.nn.Linear(width, outputs).state_dict(), folder / "model" / f"{name}_linear.pt")

    return _once(bench.scratch / "three", make) / "model"


def _base(bench: Bench, shape: Shape, folder: Path, head: Any, **settings: Any) -> Path:
    """A folder of transformers' own, with MiniLM's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm(bench)))
    tokenizer.model_max_length = LONGEST
    config = shape.config(len(tokenizer), bench.tiny)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with bench.device:  # where there are many numbers to draw
        model: Any = head.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by the first stage that asks; one that is killed meanwhile leaves none."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


@dataclass(frozen=True)
class Work:
    """What texts cost a model in arithmetic: its matrix products, a multiplication and an addition counting as two."""

    weights: int
    """Of the layers' matrices: embeddings are looked up, and what only a task's head uses is not computed."""
    windows: Sequence[int]
    """Per layer, the places that a token attends to at most."""
    hidden: int

    def products(self, lengths: Lengths) -> float:
        """Those with weights alone."""
        return 2.0 * self.weights * float(lengths.sum())

    def flops(self, lengths: Lengths) -> float:
        """For texts of these lengths in tokens; padding is no work."""
        seen = sum(float((lengths * np.minimum(lengths, window)).sum()) for window in self.windows)
        return self.products(lengths) + 4.0 * self.hidden * seen


def work_of(model: SentenceTransformer) -> Work:
    """What its transformer computes, as it was loaded."""
    transformer: Any = model[0].model
    config = transformer.config
    weights: int = sum(
        part.weight.numel()
        for name, part in transformer.named_modules()
        if isinstance(part, torch.nn.Linear) and not name.startswith("pooler")
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    local = 2 * (getattr(config, "sliding_window", None) or LONGEST) + 1
    windows = tuple(local if kind == "sliding_attention" else LONGEST for kind in kinds)
    return Work(weights, windows, config.hidden_size)
