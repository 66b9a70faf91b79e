"""What the GPU benchmark embeds, and with what: texts of real lengths, and models of real shapes with random weights.

Made here, as the machine may have no network: a tokenizer that takes whole words, weights as a fresh model has them.
Random weights compute as fast as trained ones; only what the vectors mean is missing.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from stdlib_corpus import build

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MEAN_TOKENS = 128
SPREAD = 0.8
"""Of the logarithms: a twentieth of the texts is beyond 300 tokens, a twentieth below 25."""
LONGEST = 512

_WORDS = re.compile(r"\w+|[^\w\s]+")  # as the tokenizer splits


def docstrings(everything: bool = True) -> list[str]:
    """All of the standard library's, or those of its own public parts."""
    return [record["text"] for record in build(Path(sysconfig.get_path("stdlib")), everything)]


def words_of(texts: Sequence[str], most: int) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The most frequent words and how frequent they are, as shares."""
    common = Counter(word for text in texts for word in _WORDS.findall(text.lower())).most_common(most)
    counts = np.array([count for _, count in common], np.float64)
    return [word for word, _ in common], counts / counts.sum()


def lognormal_texts(words: Sequence[str], shares: npt.NDArray[np.float64], tokens: int, seed: int = 0) -> list[str]:
    """Texts of about so many tokens in all, whose lengths are log-normal around `MEAN_TOKENS`."""
    rng = np.random.default_rng(seed)
    wanted = np.exp(rng.normal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, max(1, tokens // MEAN_TOKENS)))
    lengths = np.clip(wanted, 3, LONGEST).astype(int) - 2  # the two special tokens count
    drawn = rng.choice(len(words), lengths.sum(), p=shares)
    return [" ".join(words[i] for i in piece) for piece in np.split(drawn, np.cumsum(lengths)[:-1])]


@dataclass(frozen=True)
class ModelShape:
    """A model as its name says, without its weights."""

    name: str
    kind: Callable[..., transformers.PretrainedConfig]
    settings: dict[str, Any]
    pooling: str = "mean"

    def config(self, tiny: bool) -> transformers.PretrainedConfig:
        """`tiny`: two narrow layers, for trying the benchmark itself."""
        settings = dict(self.settings)
        if tiny:
            settings |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
            settings["vocab_size"] = min(settings["vocab_size"], 30_522)
        return self.kind(pad_token_id=1, bos_token_id=0, eos_token_id=2, **settings)


SHAPES = [
    ModelShape(
        "MiniLM-L6",
        transformers.BertConfig,
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
    ),
    ModelShape("BERT-base", transformers.BertConfig, {"vocab_size": 30_522}),
    ModelShape(
        "XLM-R-large",
        transformers.XLMRobertaConfig,
        {
            "vocab_size": 250_002,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
        pooling="cls",
    ),
    ModelShape(
        "ModernBERT-base",
        transformers.ModernBertConfig,
        {"vocab_size": 50_368, "cls_token_id": 0, "sep_token_id": 2},
    ),
]


def make_model(shape: ModelShape, folder: Path, words: Sequence[str], tiny: bool) -> Path:
    """A sentence-transformers folder: the transformer, its tokenizer, pooling and normalizing."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(shape.config(tiny)).save_pretrained(folder / "base")  # type: ignore[no-untyped-call]
    _tokenizer(words).save_pretrained(folder / "base")
    transformer = Transformer(str(folder / "base"))
    pooling = Pooling(transformer.get_embedding_dimension(), shape.pooling)
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.max_seq_length = LONGEST
    model.save(str(folder / "model"), create_model_card=False)
    shutil.rmtree(folder / "base")
    return folder / "model"


def _tokenizer(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        model_max_length=LONGEST,
    )


@dataclass(frozen=True)
class Work:
    """What texts cost a model in arithmetic: its matrix products, a multiplication and an addition counting as two."""

    weights: int
    """Of the layers' matrices: embeddings are looked up, and what only a task's head uses is not computed."""
    windows: tuple[int, ...]
    """Per layer, the places that a token attends to at most."""
    hidden: int

    def flops(self, lengths: npt.NDArray[np.int64]) -> float:
        """For texts of these lengths in tokens; padding is no work."""
        seen = sum(float((lengths * np.minimum(lengths, window)).sum()) for window in self.windows)
        return 2.0 * self.weights * float(lengths.sum()) + 4.0 * self.hidden * seen


def work_of(model: SentenceTransformer) -> Work:
    """What its transformer computes."""
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
