"""What a job asks a model for, and what the model gave: one column of results each, or a group of columns."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from embedstream.errors import UsageError

Kind = Literal["dense", "sparse", "multivector", "score", "labels"]
"""A vector; weights of the vocabulary's tokens; a vector for each token; a number for a pair; classes with scores."""

Dtype = Literal["float32", "float16", "int8", "ubinary"]
"""Of the numbers in the column. int8: which 255th of its dimension's range a number is in, the lowest being -128.
ubinary: a bit a dimension, 1 where it is above 0, the first dimension highest."""

Similarity = Literal["cosine", "dot", "euclidean", "manhattan", "maxsim", "meanmaxsim"]
"""How results are compared, in sentence-transformers' words; of distances the negative."""

Task = Literal["auto", "embed", "rerank", "classify"]
"""What a model does to rows. auto: what it is for."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_DTYPES: tuple[Dtype, ...] = get_args(Dtype)

DTYPES: dict[Kind, tuple[Dtype, ...]] = {
    "dense": ("float32", "float16", "int8", "ubinary"),
    "sparse": ("float32", "float16"),
    "multivector": ("float32", "float16"),
    "score": ("float32",),
    "labels": ("float32",),
}
"""The first is the default."""

NAMES: dict[Kind, str] = {
    "dense": "embedding",
    "sparse": "sparse",
    "multivector": "multivector",
    "score": "score",
    "labels": "label",
}
"""Of the columns, unless others are given."""

SIMILARITIES: dict[Kind, tuple[Similarity, ...]] = {
    "dense": ("cosine", "dot", "euclidean", "manhattan"),
    "sparse": ("dot", "cosine"),
    "multivector": ("maxsim", "meanmaxsim"),
}
"""Of kinds that are searched. The first is what sentence-transformers takes where a model names none."""

MOST_OUTPUTS = 16

MOST_DIMENSIONS = 1 << 20
"""No model comes near this; what is beyond it no file can hold."""

WIDEST_RANGE = 2.0**127
"""Of an int8 dimension: it is computed in float32, which ends at twice that."""


class OutputSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A column of results, as a job asks for it."""

    name: str
    kind: Kind
    dtype: Dtype = "float32"
    dim: int | None = None
    """Dimensions of a dense vector, the first of the model's; None: all of them."""

    def check(self) -> None:
        """Raise `UsageError` for what no model gives."""
        if self.dtype not in DTYPES[self.kind]:
            raise UsageError(f"--emit {self}: {self.kind} comes in {' or '.join(DTYPES[self.kind])}")
        if self.dim is not None and self.kind != "dense":
            raise UsageError(f"--emit {self}: only dense vectors are cut to fewer dimensions")
        if self.dim is not None and not 1 <= self.dim <= MOST_DIMENSIONS:
            raise UsageError(f"--emit {self}: from 1 to {MOST_DIMENSIONS:,} dimensions")
        if self.dtype == "ubinary" and (self.dim or 0) % 8:
            raise UsageError(f"--emit {self}: ubinary packs 8 dimensions into a byte: use a multiple of 8")
        if not self.name or "\0" in self.name:
            raise UsageError(f"--emit {self}: name the column")

    def __str__(self) -> str:
        """As `--emit` takes it."""
        name = "" if self.name == NAMES[self.kind] else f"={self.name}"
        dim = "" if self.dim is None else f":{self.dim}"
        return f"{self.kind}{name}:{self.dtype}{dim}"


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A column of results as it is: what the model really gave. Making one that no dataset can have is a `ValueError`,
    also where it is read of a manifest or a footer."""

    name: str
    kind: Kind
    dtype: Dtype
    dim: int
    """Of a vector, or of each token's; the size of the vocabulary for sparse ones; how many labels there are."""
    normalized: bool = False
    """Whether vectors have length 1, in int8 before they are rounded."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    ranges: bytes = b""
    """Of int8: what -128 stands for in each dimension, then what lies 255 steps above, as float32 in little-endian
    order. Empty before any row is written."""
    similarity: Similarity | None = None
    """How the model's results are to be compared, if not as usual for the kind."""

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MOST_DIMENSIONS:
            raise ValueError(f"output {self.name} has {self.dim:,} dimensions: from 1 to {MOST_DIMENSIONS:,} are kept")
        if self.dtype not in DTYPES[self.kind]:
            raise ValueError(f"output {self.name}: {self.kind} comes in {' or '.join(DTYPES[self.kind])}")
        if self.dtype == "ubinary" and self.dim % 8:
            raise ValueError(f"output {self.name}: {self.dim} bits make no whole bytes")
        if len(self.labels) != (self.dim if self.kind == "labels" else 0):
            raise ValueError(f"output {self.name} has {len(self.labels):,} labels")
        if self.ranges:
            self._check_ranges()
        if self.similarity is not None and self.similarity not in SIMILARITIES.get(self.kind, ()):
            raise ValueError(f"output {self.name}: {self.kind} results are not compared by {self.similarity}")

    def _check_ranges(self) -> None:
        if self.dtype != "int8" or len(self.ranges) != 8 * self.dim:
            raise ValueError(f"output {self.name}: its ranges have {len(self.ranges):,} bytes")
        numbers = struct.unpack(f"<{2 * self.dim}f", self.ranges)
        widths = (high - low for low, high in zip(numbers[: self.dim], numbers[self.dim :], strict=True))
        if not all(0 <= width <= WIDEST_RANGE for width in widths):
            raise ValueError(f"output {self.name}: one of its ranges is none")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns in the dataset."""
        return column_names(self.kind, self.name)

    def __str__(self) -> str:
        """For people, as `384 dimensions`, or `small: dense in ubinary, 256 dimensions`."""
        what = {"sparse": "tokens", "labels": "labels"}.get(self.kind, "dimensions")
        size = "" if self.kind == "score" else f", {self.dim:,} {what}"
        if (self.name, self.dtype) == (NAMES["dense"], "float32"):
            return size[2:]
        name = "" if self.name == NAMES[self.kind] else f"{self.name}: "
        return f"{name}{self.kind}{'' if self.dtype == 'float32' else f' in {self.dtype}'}{size}"


def has_ranges(rows: int, outputs: Sequence[Output]) -> bool:
    """Whether what int8 numbers stand for is known of all of them, or there are no rows."""
    return not rows or all(output.ranges for output in outputs if output.dtype == "int8")


def without_ranges(outputs: Sequence[Output]) -> tuple[Output, ...]:
    """The outputs as they are before any row is written."""
    return tuple(msgspec.structs.replace(output, ranges=b"") if output.ranges else output for output in outputs)


def encode_ranges(outputs: Sequence[Output]) -> str:
    """The ranges of all int8 outputs as JSON, by name, in base64; empty as long as they are not known."""
    found = {output.name: output.ranges for output in outputs if output.ranges}
    return msgspec.json.encode(found).decode() if found else ""


def with_ranges(outputs: Sequence[Output], encoded: str) -> tuple[Output, ...]:
    """The outputs with the ranges that `encode_ranges` gave. Raises `ValueError` for others than theirs."""
    found = msgspec.json.decode(encoded, type=dict[str, bytes])
    made = tuple(
        msgspec.structs.replace(each, ranges=found.get(each.name, b"")) if each.dtype == "int8" else each
        for each in outputs
    )
    if not has_ranges(1, made) or encode_ranges(made) != encoded:
        raise ValueError("it has ranges of other outputs")
    return made


def describe(outputs: Sequence[Output]) -> str:
    """All of them in a line, for people."""
    return "; ".join(map(str, outputs))


def column_names(kind: Kind, name: str) -> tuple[str, ...]:
    """The columns that an output has in the dataset: one, or three for labels."""
    if kind != "labels":
        return (name,)
    prefix = "" if name == NAMES["labels"] else f"{name}_"
    return (name, f"{prefix}score", f"{prefix}scores")


def parse_emit(text: str) -> OutputSpec:
    """Read `KIND[=NAME][:DTYPE][:DIM]`, as `dense=small:ubinary:256`. Raises `UsageError`."""
    head, *rest = text.split(":")
    kind, has_name, name = head.partition("=")
    if kind not in KINDS:
        raise UsageError(f"--emit {text}: begin with {', '.join(KINDS)}: KIND[=NAME][:DTYPE][:DIM]")
    dtype: Dtype | None = None
    dim = None
    for word in rest:
        if word.isascii() and word.isdigit() and dim is None:
            dim = int(word[:10])  # beyond any bound; Python refuses to convert thousands of digits
        elif word in _DTYPES and dtype is None:
            dtype = word
        else:
            raise UsageError(f"--emit {text}: {word!r} is not its one dtype ({', '.join(_DTYPES)}) nor its one number")
    made = OutputSpec(name=name if has_name else NAMES[kind], kind=kind, dtype=dtype or "float32", dim=dim)
    made.check()
    return made


def check_outputs(outputs: tuple[OutputSpec, ...], taken: frozenset[str] | set[str]) -> None:
    """Raise `UsageError` for outputs that one dataset cannot have. `taken`: names of its other columns."""
    if len(outputs) > MOST_OUTPUTS:
        raise UsageError(f"--emit: {len(outputs)} outputs, at most {MOST_OUTPUTS} are made")
    named = set(taken)
    for output in outputs:
        output.check()
        for column in column_names(output.kind, output.name):
            if column in named:
                raise UsageError(f"--emit {output}: the dataset has a column {column} already: give another name")
            named.add(column)
