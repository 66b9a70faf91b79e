"""Types of kept fields: they travel in blocks as text, and become columns of the dataset of these types."""

from __future__ import annotations

import math
import re
from typing import Any

import pyarrow as pa

from embedstream.jobs import KeptType

COLUMN_TYPES: dict[KeptType, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}

TAKES: dict[KeptType, str] = {
    "int64": "whole numbers of 64 bits",
    "float64": "numbers",
    "bool": "true and false",
}
"""What fits a type, in words."""

_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII).fullmatch
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII).fullmatch


def fits(text: str, type: KeptType) -> bool:
    """Whether the JSON text of a value is one of the type; so `typed` can convert it."""
    match type:
        case "int64":
            return _INTEGER(text) is not None and -(2**63) <= int(text) < 2**63
        case "float64":
            return _NUMBER(text) is not None and math.isfinite(float(text))
        case "bool":
            return text in ("true", "false")
        case "string":
            return True


def typed(column: Any, type: KeptType) -> Any:
    """A column, or a chunked one, of strings as one of the type; one that has the type already as it is.

    Raises:
        pa.ArrowInvalid: a value does not fit.
    """
    return column if column.type.equals(COLUMN_TYPES[type]) else column.cast(COLUMN_TYPES[type])


def kept_type(type: pa.DataType) -> KeptType:
    """The type that a kept column of Arrow data has in the dataset, unless the job says another."""
    if pa.types.is_boolean(type):
        return "bool"
    if pa.types.is_floating(type):
        return "float64"
    if pa.types.is_integer(type) and not pa.types.is_uint64(type):
        return "int64"
    return "string"
