"""Model folders of the kinds that give something else than one vector for each text, with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from engines.model_shapes import unigram_tokenizer
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

LONGEST = 128
LABELS = ("art", "law", "sport")


def splade(folder: Path, minilm: Path, _: list[str]) -> Path:
    base = _base(folder, minilm, transformers.AutoModelForMaskedLM)
    modules = [Transformer(base, transformer_task="fill-mask"), SpladePooling("max")]
    return _saved(folder, SparseEncoder(modules=modules, device="cpu"))


def splade_twice(folder: Path, minilm: Path, _: list[str]) -> Path:
    """As Opensearch's: the logarithm twice; and of a text's weights only the greatest."""
    base = _base(folder, minilm, transformers.AutoModelForMaskedLM)
    pooling = SpladePooling("max", activation_function="log1p_relu")
    modules = [Transformer(base, transformer_task="fill-mask"), pooling]
    return _saved(folder, SparseEncoder(modules=modules, device="cpu", max_active_dims=64))


def splade_sum(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Pooled in a way that cannot be fused."""
    base = _base(folder, minilm, transformers.AutoModelForMaskedLM)
    modules = [Transformer(base, transformer_task="fill-mask"), SpladePooling("sum")]
    return _saved(folder, SparseEncoder(modules=modules, device="cpu"))


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


def bge_m3(folder: Path, _: Path, texts: list[str]) -> Path:
    """One vector, weights of tokens and a vector for each token, from one pass."""
    tokenizer = unigram_tokenizer(texts)
    tokenizer.model_max_length = LONGEST
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST + 2,
        pad_token_id=1,
        type_vocab_size=1,
    )
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder / "base")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder / "base")
    modules = [Transformer(str(folder / "base")), Pooling(32, "cls"), Normalize()]
    made = _saved(folder, SentenceTransformer(modules=modules, device="cpu"))
    torch.save(torch.nn.Linear(32, 32).state_dict(), made / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), made / "sparse_linear.pt")
    return made


def _classifier(folder: Path, minilm: Path, **settings: Any) -> str:
    names = dict(enumerate(LABELS))
    head = transformers.AutoModelForSequenceClassification
    return _base(folder, minilm, head, num_labels=len(LABELS), id2label=names, **settings)


def _base(folder: Path, minilm: Path, head: Any, **settings: Any) -> str:
    """A small BERT with a head."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.model_max_length = LONGEST
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(1)
    head.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def _saved(folder: Path, model: Any) -> Path:
    model.save(str(folder / "model"))
    return folder / "model"
