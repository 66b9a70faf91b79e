"""Small random models of several shapes, saved as folders, and a corpus of real texts to try them on."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

LONGEST = 128
"""Tokens that most of them take."""

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}

Shape = Callable[[Path, Path, list[str]], Path]
"""(folder to work in, MiniLM's folder, texts to train a tokenizer on) -> the model's folder."""


def docstrings() -> list[str]:
    """Docstrings of the standard library's top-level modules: real English of uneven length, without repeats."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found[text] = None
    return list(found)


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]


def unigram_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _fast(
        tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )


def _bpe_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    fast = _fast(tokenizer, pad_token="<|end|>", eos_token="<|end|>")
    fast.padding_side = "left"
    return fast


def save_base(
    folder: Path,
    config: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    head: Any = transformers.AutoModel,
    seed: int = 0,
) -> str:
    """A folder of transformers' own, with random weights."""
    torch.manual_seed(seed)
    head.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _transformer(
    folder: Path, config: transformers.PretrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase, seed: int = 0
) -> Transformer:
    transformer: Transformer = Transformer(save_base(folder, config, tokenizer, seed=seed))
    return transformer


def bert_config(vocabulary: int, **settings: Any) -> transformers.BertConfig:
    return transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=LONGEST, **SMALL, **settings)


def xlm_roberta_config(vocabulary: int, longest: int = LONGEST, **shape: int) -> transformers.XLMRobertaConfig:
    return transformers.XLMRobertaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=longest + 2,
        pad_token_id=1,
        type_vocab_size=1,
        **SMALL | shape,
    )


def minilm_tokenizer(minilm: Path, longest: int = LONGEST) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    tokenizer.model_max_length = longest
    return tokenizer


def _bert(folder: Path, minilm: Path, seed: int = 0) -> Transformer:
    tokenizer = minilm_tokenizer(minilm)
    return _transformer(folder, bert_config(len(tokenizer)), tokenizer, seed)


def _bert_pooled(mode: PoolingMode) -> Shape:
    """All of BERT's texts pooled one way, in the spelling of today."""

    def make(folder: Path, minilm: Path, _: list[str]) -> Path:
        return _save(
            folder, SentenceTransformer(modules=[_bert(folder / "base", minilm), Pooling(32, mode)], device="cpu")
        )

    make.__name__ = f"bert_{mode}"
    return make


bert_cls = _bert_pooled("cls")


def old_pooling_spelling(folder: Path, minilm: Path, texts: list[str]) -> Path:
    """One boolean for each way of pooling, two of them true."""
    model = _bert_pooled("mean")(folder, minilm, texts)
    modes = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_sqrt_len_tokens", "weightedmean_tokens")}
    config = {
        "word_embedding_dimension": 32,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": True,
        **modes,
    }
    (model / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return model


def mpnet(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Relative positions, and absolute ones that begin after the padding's."""
    tokenizer = minilm_tokenizer(minilm)
    config = transformers.MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=LONGEST + 2, **SMALL)
    modules = [_transformer(folder / "base", config, tokenizer), Pooling(32, "mean"), Normalize()]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def distilbert(folder: Path, minilm: Path, _: list[str]) -> Path:
    """No token types, and a Dense with its own activation behind the pooling."""
    tokenizer = minilm_tokenizer(minilm)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=128
    )
    modules = [_transformer(folder / "base", config, tokenizer), Pooling(32, "mean"), Dense(32, 48)]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def modernbert(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Rotary positions, and attention that sees 16 tokens around in all layers but each second."""
    tokenizer = minilm_tokenizer(minilm)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST,
        **SMALL | {"num_hidden_layers": 3},
        local_attention=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        cls_token_id=101,
        sep_token_id=102,
    )
    modules = [_transformer(folder / "base", config, tokenizer), Pooling(32, "cls"), Normalize()]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def bert_without_prompt(folder: Path, minilm: Path, _: list[str]) -> Path:
    """CLS pooling, a Dense and a Normalize behind it."""
    base = _bert(folder / "base", minilm)
    modules = [base, Pooling(32, "cls", include_prompt=False), Dense(32, 24), Normalize()]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def bert_mean_without_prompt(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Mean pooling over everything but the prompt, as the INSTRUCTOR models do it."""
    modules = [_bert(folder / "base", minilm), Pooling(32, "mean", include_prompt=False)]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def xlm_roberta(folder: Path, _: Path, texts: list[str]) -> Path:
    """Positions that begin after the padding's, an own sentencepiece-like tokenizer, three poolings at once."""
    tokenizer = unigram_tokenizer(texts)
    base = _transformer(folder / "base", xlm_roberta_config(len(tokenizer)), tokenizer)
    modules = [base, Pooling(32, ("mean", "max", "weightedmean"))]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.max_seq_length = 100
    return _save(folder, model)


def decoder(folder: Path, _: Path, texts: list[str]) -> Path:
    """Causal attention, padding on the left, the last token's vector, no maximum but the positions."""
    tokenizer = _bpe_tokenizer(texts)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **SMALL
    )
    modules = [_transformer(folder / "base", config, tokenizer), Pooling(32, "lasttoken"), Normalize()]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def plain_transformers(folder: Path, minilm: Path, _: list[str]) -> Path:
    """A folder without `modules.json`."""
    _bert(folder / "model", minilm)
    return folder / "model"


def truncated_dimensions(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Vectors that the model's own configuration cuts short."""
    modules = [_bert(folder / "base", minilm), Pooling(32, "mean"), Normalize()]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu", truncate_dim=8))


def router(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Other weights for queries than for documents."""
    routes = Router.for_query_document(
        query_modules=[_bert(folder / "q", minilm, seed=1), Pooling(32, "mean")],
        document_modules=[_bert(folder / "d", minilm, seed=2), Pooling(32, "cls")],
    )
    return _save(folder, SentenceTransformer(modules=[routes, Normalize()], device="cpu"))


def nearly_equal_vectors(folder: Path, minilm: Path, texts: list[str]) -> Path:
    """What tells texts apart is little beside what they share, which a Dense takes away: too little for bfloat16."""
    base = _bert(folder / "base", minilm)
    with torch.no_grad():
        base.get_parameter("model.embeddings.word_embeddings.weight").mul_(1e-4)
    modules = [base, Pooling(32, "cls")]
    shared = SentenceTransformer(modules=modules, device="cpu").encode(texts[:20], convert_to_tensor=True).mean(dim=0)
    centre = Dense(32, 32, activation_function=torch.nn.Identity())
    with torch.no_grad():
        centre.linear.weight.copy_(torch.eye(32))
        centre.linear.bias.copy_(-shared)
    return _save(folder, SentenceTransformer(modules=[*modules, centre], device="cpu"))


def static_embedding(folder: Path, minilm: Path, _: list[str]) -> Path:
    """Token vectors from a table, averaged: nothing to pad, no special tokens, no maximum."""
    torch.manual_seed(0)
    backend = minilm_tokenizer(minilm).backend_tokenizer
    return _save(folder, SentenceTransformer(modules=[StaticEmbedding(backend, embedding_dim=16)], device="cpu"))


def python_tokenizer(folder: Path, _: Path, __: list[str]) -> Path:
    """A tokenizer without a fast form: one token per byte. (Canine's lists all of Unicode, for seconds.)"""
    tokenizer = transformers.ByT5Tokenizer(model_max_length=100)
    modules = [_transformer(folder / "base", bert_config(65_536), tokenizer), Pooling(32, "mean")]
    return _save(folder, SentenceTransformer(modules=modules, device="cpu"))


def _save(folder: Path, model: SentenceTransformer) -> Path:
    model.prompts = {"query": "find this: ", "document": "", "topic": "by topic: "}
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


SHAPES: list[Shape] = [
    bert_cls,
    *map(_bert_pooled, get_args(PoolingMode)[1:]),
    old_pooling_spelling,
    bert_without_prompt,
    bert_mean_without_prompt,
    xlm_roberta,
    mpnet,
    distilbert,
    modernbert,
    decoder,
    plain_transformers,
    truncated_dimensions,
    router,
    static_embedding,
    python_tokenizer,
]
