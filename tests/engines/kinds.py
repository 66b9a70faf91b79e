"""Model folders of the kinds that give something else than one vector for each text, with random weights."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
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


def pylate(folder: Path, minilm: Path, _: list[str]) -> Path:
    """As PyLate saves up to its third version: marks in front of texts are settings, the mask is its code's."""
    tokenizer = minilm_tokenizer(minilm)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    path = Path(save_base(folder / "pylate", bert_config(len(tokenizer), initializer_range=0.2), tokenizer, seed=4))
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    listed = [{"idx": at, "name": str(at), "path": place, "type": kind} for at, (place, kind) in enumerate(modules)]
    _write(path / "modules.json", listed)
    _write(path / "sentence_bert_config.json", {"max_seq_length": LONGEST - 1, "do_lower_case": False})
    settings: dict[str, Any] = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] "}
    settings |= {"query_length": 32, "document_length": LONGEST, "attend_to_expansion_tokens": False}
    settings |= {"prompts": {}, "similarity_fn_name": "MaxSim", "skiplist_words": list(string.punctuation)}
    _write(path / "config_sentence_transformers.json", settings)
    (path / "1_Dense").mkdir()
    dense = {"in_features": 32, "out_features": 16, "bias": False}
    _write(path / "1_Dense" / "config.json", {**dense, "activation_function": "torch.nn.modules.linear.Identity"})
    save_file({"linear.weight": torch.randn(16, 32)}, path / "1_Dense" / "model.safetensors")
    return path


def stanford(folder: Path, minilm: Path, _: list[str]) -> Path:
    """As Stanford's ColBERT saves: the projection beside the weights of BERT, settings in a file of its own."""
    path = Path(_base(folder, minilm, transformers.AutoModel))
    weights = load_file(path / "model.safetensors")
    named = {f"bert.{name}": tensor for name, tensor in weights.items()} | {"linear.weight": torch.randn(16, 32)}
    save_file(named, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    _write(path / "config.json", {**config, "architectures": ["HF_ColBERT"]})
    settings = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 32, "doc_maxlen": LONGEST}
    _write(path / "artifact.metadata", {**settings, "attend_to_mask_tokens": False, "mask_punctuation": True})
    return path


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


def _write(path: Path, settings: Any) -> None:
    path.write_text(json.dumps(settings))


def _saved(folder: Path, model: Any) -> Path:
    model.save(str(folder / "model"))
    return folder / "model"
