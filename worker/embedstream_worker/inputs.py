"""A cut by characters, before a text is tokenized."""

from __future__ import annotations

from collections.abc import Sequence


def cut_characters(texts: Sequence[str], most: int, keep_end: bool = False) -> tuple[list[str], list[int]]:
    """Cut texts to `most` characters from their start (or end); also the row numbers of those that were longer."""
    longer = [row for row, text in enumerate(texts) if len(text) > most]
    if not longer:
        return list(texts), longer
    cut = list(texts)
    for row in longer:
        cut[row] = cut[row][-most:] if keep_end else cut[row][:most]
    return cut, longer
