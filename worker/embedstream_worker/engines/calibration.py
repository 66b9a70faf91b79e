"""The texts that int8 is calibrated with, the same for every worker, and that the check at load uses."""

from __future__ import annotations

import functools
from hashlib import blake2b
from importlib.resources import files

_TEXTS = 300
_SENTENCES = (1, 1, 2, 1, 3, 2, 5, 1, 8, 2, 13, 4, 16, 3)  # per text, in turn: short ones are frequent, as in life


@functools.cache
def calibration_texts() -> tuple[str, ...]:
    """300 texts of 1 to 16 sentences: questions, prose, notices, code, several languages."""
    sentences = (files("embedstream_worker.engines") / "calibration.txt").read_text("utf-8").splitlines()
    count = len(sentences)
    return tuple(
        " ".join(sentences[(7 * text + 11 * place) % count] for place in range(_SENTENCES[text % len(_SENTENCES)]))
        for text in range(_TEXTS)
    )


def calibration_hash() -> str:
    """16 hex digits: equal for equal texts."""
    return blake2b("\0".join(calibration_texts()).encode(), digest_size=8).hexdigest()
