"""A job with several outputs of the hashing engine, and whether they agree. Shares no code with what writes them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

EMIT = ("--emit", "dense", "--emit", "dense=bits:ubinary", "--emit", "dense=half:float16:64")
INT8 = ("--emit", "dense=tiny:int8:32")
"""One more, whose numbers mean what the first rows of the job decide."""

Vector = npt.NDArray[np.float32]


def agreed(vector: Vector, bits: bytes, half: npt.NDArray[Any]) -> Vector:
    """The vector [384], if the bits and the half [64] are those that are made of it; NaN otherwise."""
    first = vector[:64] / np.linalg.norm(vector[:64])
    good = bits == np.packbits(vector > 0).tobytes() and np.allclose(half.astype(np.float32), first, rtol=0, atol=1e-3)
    return vector if good else np.full_like(vector, np.nan)


def with_tiny(vector: Vector, tiny: npt.NDArray[Any], manifest: dict[str, Any]) -> Vector:
    """The vector, if the numbers in int8 [32] are those that the manifest's ranges make of it; NaN otherwise."""
    (output,) = (output for output in manifest["outputs"] if output["name"] == "tiny")
    low, high = np.frombuffer(base64.b64decode(output["ranges"]), "<f4").reshape(2, 32)
    first = vector[:32] / np.linalg.norm(vector[:32])
    steps = np.clip(np.floor((first - low) / ((high - low) / 255)), 0, 255) - 128
    return vector if np.abs(steps - tiny).max() <= 1 else np.full_like(vector, np.nan)


def of_row(row: dict[str, Any], manifest: dict[str, Any]) -> Vector:
    """The vector of a row of the dataset in files."""
    vector = agreed(np.array(row["embedding"], np.float32), row["bits"], np.array(row["half"]))
    return with_tiny(vector, np.array(row["tiny"]), manifest) if "tiny" in row else vector


def of_hash(row: dict[bytes, bytes], manifest: dict[str, Any]) -> Vector:
    """The same of a hash."""
    vector = agreed(np.frombuffer(row[b"embedding"], "<f4"), row[b"bits"], np.frombuffer(row[b"half"], "<f2"))
    return with_tiny(vector, np.frombuffer(row[b"tiny"], np.int8), manifest) if b"tiny" in row else vector
