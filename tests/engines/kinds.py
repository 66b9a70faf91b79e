"""Model folders of the kinds that give something else than one vector for each text, with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from engines.model_shapes import (
    LONGEST,
    bert_config,
    minilm_tokenizer,
    save_base,
    unigram_tokenizer,
    xlm_roberta_config,
)
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

LABELS = ("art", "law", "sport")


def splade(folder: Path, minilm: Path, _: list[str]) -> Path:
    return _splade(folder, minilm, SpladePooling("max"))


def splade_twice(folder: Path, minilm: Path, _: list[str]) -> Path:
    """As Opensearch's: the logarithm twice; and of a text's weights only the greatest."""
    return _splade(folder, minilm, SpladePooling("max", activation_function="log1p_relu"), max_active_dims=64)


def splade_sum(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Pooled in a way that cannot be fused."""
    return _splade(folder, minilm, SpladePooling("sum"))


def inference_free(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Queries are looked up in a table."""
    base = _base(folder, minilm, transformers.AutoModelForMaskedLM)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(minilm)
    routes: dict[str, list[Any]] = {
        "query": [SparseStaticEmbedding(tokenizer, torch.rand(len(tokenizer)))],
        "document": [Transformer(base, transformer_task="fill-mask"), SpladePooling("max")],
    }
    return _saved(folder, SparseEncoder(modules=[Router(routes, default_route="document")], device="cpu"))


def colbert(folder: Path, minilm: Path, _: list[str]) -> Path:
    torch.manual_seed(3)
    tokens = "token_embeddings"
    dense = Dense(32, 16, False, torch.nn.Identity(), module_input_name=tokens, module_output_name=tokens)
    mask = MultiVectorMask(skiplist_words=list(string.punctuation))
    transformer = Transformer(_base(folder, minilm, transformers.AutoModel))
    modules = [transformer, dense, mask, Normalize(module_input_name=tokens)]
    return _saved(folder, MultiVectorEncoder(modules=modules, device="cpu"))


def cross_encoder(folder: Path, minilm: Path, _: list[str]) -> Path:
    base = _base(folder, minilm, transformers.AutoModelForSequenceClassification, num_labels=1)
    return _saved(folder, CrossEncoder(base, device="cpu"))


def reranker(folder: Path, minilm: Path, _: list[str]) -> Path:
    """A folder of transformers' own."""
    return Path(_base(folder, minilm, transformers.AutoModelForSequenceClassification, num_labels=1))


def classifier(folder: Path, minilm: Path, _: list[str]) -> Path:
    return Path(_classifier(folder, minilm))


def multi_label(folder: Path, minilm: Path, _: list[str]) -> Path:
    return Path(_classifier(folder, minilm, problem_type="multi_label_classification"))


def bge_m3(folder: Path, _: Path, texts: list[str], longest: int = LONGEST, **shape: int) -> Path:
    """One vector, weights of tokens and a vector for each token, from one pass. `shape`: instead of a small one."""
    tokenizer = unigram_tokenizer(texts)
    tokenizer.model_max_length = longest
    config = xlm_roberta_config(len(tokenizer), longest, **shape)
    width = config.hidden_size
    modules = [Transformer(save_base(folder / "base", config, tokenizer)), Pooling(width, "cls"), Normalize()]
    made = _saved(folder, SentenceTransformer(modules=modules, device="cpu"))
    torch.save(torch.nn.Linear(width, width).state_dict(), made / "colbert_linear.pt")
    torch.save(torch.nn.Linear(width, 1).state_dict(), made / "sparse_linear.pt")
    return made


def _splade(folder: Path, minilm: Path, pooling: SpladePooling, **settings: Any) -> Path:
    base = _base(folder, minilm, transformers.AutoModelForMaskedLM)
    modules = [Transformer(base, transformer_task="fill-mask"), pooling]
    return _saved(folder, SparseEncoder(modules=modules, device="cpu", **settings))


def _classifier(folder: Path, minilm: Path, **settings: Any) -> str:
    names = dict(enumerate(LABELS))
    head = transformers.AutoModelForSequenceClassification
    return _base(folder, minilm, head, num_labels=len(LABELS), id2label=names, **settings)


def _base(folder: Path, minilm: Path, head: Any, **settings: Any) -> str:
    """A small BERT with a head."""
    tokenizer = minilm_tokenizer(minilm)
    config = bert_config(len(tokenizer), initializer_range=0.2, **settings)
    return save_base(folder / "base", config, tokenizer, head, seed=1)


def _saved(folder: Path, model: Any) -> Path:
    model.save(str(folder / "model"))
    return folder / "model"
