"""The hashing engine's formula once more, written for reading: one text, plain integers, nothing shared with it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_64 = (1 << 64) - 1
_32 = (1 << 32) - 1


def reference_vector(text: str, dim: int = 384, max_length: int = 8192) -> npt.NDArray[np.float32]:
    """The vector of one text (prompt included), [dim]; equal to the engine's within 1e-6."""
    content = text.encode() or b"\0"
    tokens = [int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)][:max_length]
    total = 0
    for place, token in enumerate(tokens, start=1):
        total = (total + _mix64((token + place * 0x9E3779B97F4A7C15) & _64)) & _64
    seed = _mix64((total + len(tokens)) & _64)
    low, step = seed & _32, (seed >> 32) | 1
    values = []
    for k in range(1, dim + 1):
        unsigned = _mix32((low + step * k) & _32)
        values.append((unsigned - (1 << 32) if unsigned >> 31 else unsigned) / 2**31)
    norm = math.sqrt(math.fsum(value * value for value in values))
    return np.array([value / norm for value in values], np.float32)


def _mix64(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _32
    x ^= x >> 15
    x = x * 0x846CA68B & _32
    return x ^ (x >> 16)
