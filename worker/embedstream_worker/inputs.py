"""From a text to what enters the model: the prompt in front, and a cut by characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa


def model_inputs(texts: pa.Array[Any], prompt: str) -> list[str]:
    """The exact texts that enter the model. `texts`: string array without nulls; an empty prompt adds nothing."""
    strings = cast("list[str]", texts.to_pylist())
    return [prompt + text for text in strings] if prompt else strings


def cut_characters(texts: Sequence[str], most: int, keep_end: bool = False) -> tuple[list[str], list[int]]:
    """Cut texts to `most` characters from their start (or end); also the row numbers of those that were longer."""
    longer = [row for row, text in enumerate(texts) if len(text) > most]
    if not longer:
        return list(texts), longer
    cut = list(texts)
    for row in longer:
        cut[row] = cut[row][-most:] if keep_end else cut[row][:most]
    return cut, longer
