"""What is embedded: the standard library's docstrings as they come, texts of equal length, synthetic lines; and a model
of random weights that takes long texts."""

from __future__ import annotations

import json
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from stdlib_corpus import build


def docstrings(count: int | None = None) -> list[str]:
    """Title and text of each record, evenly drawn if fewer are wanted."""
    texts = [f"{record['title']} {record['text']}" for record in build(Path(sysconfig.get_path("stdlib")), False)]
    if count is None or count >= len(texts):
        return texts
    return [texts[i * len(texts) // count] for i in range(count)]


def equal_texts(model: Path, tokens: int, count: int) -> list[str]:
    """Texts that a model cuts to exactly `tokens` tokens, special tokens included, and hardly longer than that."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = [word for text in docstrings() for word in text.split()]
    sizes = [len(e.ids) for e in tokenizer.encode_batch_fast(words, add_special_tokens=False)]
    texts: list[str] = []
    at, start, held = 0, 0, 0
    while len(texts) < count:
        held += sizes[at % len(words)]
        at += 1
        if held >= tokens:
            texts.append(" ".join(words[i % len(words)] for i in range(start, at)))
            start, held = at, 0
    return texts


def write_corpus(path: Path, texts: Iterable[str]) -> Path:
    """JSON lines; the id of a text is its number."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    return path


def synthetic_texts(count: int, characters: int = 500, seed: int = 1) -> Iterable[str]:
    """English-like words, each text of exactly `characters` ASCII characters, all different."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    weights = range(len(letters), 0, -1)
    words = ["".join(rng.choices(letters, weights, k=rng.randint(2, 9))) for _ in range(5000)]
    for i in range(count):
        text = f"{i} " + " ".join(rng.choices(words, k=characters // 4))
        yield text[:characters].ljust(characters, ".")


def random_model(place: Path, like: Path, positions: int) -> Path:
    """MiniLM's shape and tokenizer with random weights and more positions; made once."""
    folder = place / f"random-bert-{positions}"
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoConfig, BertModel

    unfinished = place / f"random-bert-{positions}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(like, unfinished)
    config = AutoConfig.from_pretrained(str(like))
    config.max_position_embeddings = positions
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(str(unfinished))
    settings = unfinished / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": positions}))
    tokenizer = unfinished / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": positions}))
    unfinished.rename(folder)
    return folder
