"""What a model is for, decided from its folder's files before any library opens them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

from embedstream_worker.model_settings import MODULE_KINDS, read_json, read_settings


class Purpose(enum.StrEnum):
    """The class of sentence-transformers that loads it."""

    VECTORS = "SentenceTransformer"  # a vector for each text
    SPARSE = "SparseEncoder"  # weights of the vocabulary's tokens
    MULTIVECTOR = "MultiVectorEncoder"  # a vector for each token
    PAIRS = "CrossEncoder"  # scores of pairs, or labels


HEADS = ("sparse_linear.pt", "colbert_linear.pt")
"""Beside a transformer, as BGE-M3 has them: from its tokens to sparse vectors, and to a vector for each token."""

_SPARSE = {"SpladePooling", "SparseAutoEncoder", "SparseStaticEmbedding"}


def purpose_of(folder: Path) -> Purpose:
    """Raises `ModelError` for files that cannot be read."""
    said = _read(folder / "config_sentence_transformers.json").get("model_type")
    if said == "ColBERT":  # PyLate's word
        return Purpose.MULTIVECTOR
    if isinstance(said, str) and said in Purpose.__members__.values() and said != Purpose.VECTORS:
        return Purpose(said)
    listing = folder / "modules.json"
    if listing.is_file():
        listed = read_json(listing)
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        kinds = {MODULE_KINDS.get(str(entry.get("type"))) for entry in entries}
        return Purpose.SPARSE if kinds & _SPARSE else Purpose.VECTORS
    names = _read(folder / "config.json").get("architectures")
    for name in map(str, names if isinstance(names, list) else ()):
        if name == "HF_ColBERT":  # Stanford's
            return Purpose.MULTIVECTOR
        if name.endswith("ForSequenceClassification"):
            return Purpose.PAIRS
    return Purpose.VECTORS


def has_heads(folder: Path) -> bool:
    """Whether it gives sparse vectors and a vector for each token beside the one vector of a text, as BGE-M3 does."""
    return all((folder / name).is_file() for name in HEADS)


def _read(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}
