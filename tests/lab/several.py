"""A job with several outputs of the hashing engine, and whether they agree. Shares no code with what writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

EMIT = ("--emit", "dense", "--emit", "dense=bits:ubinary", "--emit", "dense=half:float16:64")

Vector = npt.NDArray[np.float32]


def agreed(vector: Vector, bits: bytes, half: npt.NDArray[Any]) -> Vector:
    """The vector [384], if the bits and the half [64] are those that are made of it; NaN otherwise."""
    first = vector[:64] / np.linalg.norm(vector[:64])
    good = bits == np.packbits(vector > 0).tobytes() and np.allclose(half.astype(np.float32), first, rtol=0, atol=1e-3)
    return vector if good else np.full_like(vector, np.nan)


def of_row(row: dict[str, Any]) -> Vector:
    """The vector of a row of the dataset in files."""
    return agreed(np.array(row["embedding"], np.float32), row["bits"], np.array(row["half"]))


def of_hash(embedding: bytes, bits: bytes, half: bytes) -> Vector:
    """The same of a hash's fields."""
    return agreed(np.frombuffer(embedding, "<f4"), bits, np.frombuffer(half, "<f2"))
