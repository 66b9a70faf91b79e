"""The texts that int8 is calibrated with, the same for every worker, and those that the check at load uses."""

from __future__ import annotations

import functools
from hashlib import blake2b
from importlib.resources import files

_SENTENCES = (1, 1, 2, 1, 3, 2, 5, 1, 8, 2, 13, 4, 16, 3)  # per text, in turn: short ones are frequent, as in life


@functools.cache
def calibration_texts() -> tuple[str, ...]:
    """About 200 texts of 3 to 400 tokens.

    Documents: docstrings, code, tables, logs, lists, letters, addresses, numbers, several languages. And texts of 1 to
    16 sentences: questions, prose, notices.
    """
    documents = _read("calibration_documents.txt").removesuffix("\n").split("\n%\n")
    return (*documents, *(_composed(place) for place in range(140)))


@functools.cache
def check_texts() -> tuple[str, ...]:
    """12 texts of 1 to 16 sentences."""
    return tuple(_composed(place) for place in range(0, 300, 25))


def _composed(text: int) -> str:
    sentences = _read("calibration.txt").splitlines()
    count = _SENTENCES[text % len(_SENTENCES)]
    return " ".join(sentences[(7 * text + 11 * place) % len(sentences)] for place in range(count))


@functools.cache
def _read(name: str) -> str:
    return (files("embedstream_worker.engines") / name).read_text("utf-8")


def calibration_hash() -> str:
    """16 hex digits: equal for equal texts."""
    return blake2b("\0".join((*check_texts(), *calibration_texts())).encode(), digest_size=8).hexdigest()
