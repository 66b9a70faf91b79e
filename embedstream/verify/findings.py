"""What can be wrong with a dataset, where it was found, and how much of it is told."""

from __future__ import annotations

import enum

import msgspec

MOST_SHOWN = 10
"""Findings of a kind that are kept; of all others only the number."""


class Kind(enum.StrEnum):
    """What is wrong. Stable: scripts of users match on them."""

    MANIFEST = "manifest"  # cannot be read, or contradicts itself
    MISSING_FILE = "missing_file"  # a listed file is not there
    CHECKSUM = "checksum"  # a file is not the one that was committed
    UNREADABLE = "unreadable"  # a file cannot be decoded
    FOOTER = "footer"  # a file says that it is something else than the manifest says
    SPACE = "space"  # vectors that cannot be compared with the others
    COLUMNS = "columns"  # other columns, types or dimensions than the job's
    COUNT = "count"  # another number of rows, tokens or truncated texts than the manifest or the footer says
    BLOCK = "block"  # a block is missing, or listed twice
    PLACE = "place"  # a row says that it is at a place that no corpus has
    DOUBLED = "doubled"  # a row comes twice
    IN_BOTH = "in_both"  # a row is in the dataset and in its errors
    NOT_FINITE = "not_finite"  # a vector with NaN or infinity
    ZERO = "zero"  # a vector of zeros
    NORM = "norm"  # a vector whose length is not 1, though the model normalizes
    VALUES = "values"  # weights that are not above 0 or not in order, or a label that is not the best one
    ERRORS = "errors"  # the errors as people read them are not those of the shards
    NOT_IN_DATASET = "not_in_dataset"  # a row of the corpus is neither in the dataset nor in its errors
    NOT_IN_CORPUS = "not_in_corpus"  # a row of the dataset that the corpus does not have
    OTHER_ID = "other_id"  # the row at a place of the corpus has another id
    OTHER_TEXT = "other_text"  # a row was made of another text than it should
    OTHER_FIELDS = "other_fields"  # a row's kept fields are not those of the corpus


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that is wrong."""

    message: str
    file: str | None = None
    """A file of the dataset, or a key in Redis."""
    row: int | None = None
    """Which row of that file, from 0."""
    id: str | None = None


class Findings:
    """Everything that is wrong: all of it counted, the first of each kind in words."""

    def __init__(self) -> None:
        self.counts: dict[Kind, int] = {}
        self.first: dict[Kind, list[Finding]] = {}

    def add(
        self, kind: Kind, message: str, file: str | None = None, row: int | None = None, id: str | None = None
    ) -> None:
        """One more of a kind."""
        if self.room(kind):
            self.first.setdefault(kind, []).append(Finding(message=message, file=file, row=row, id=id))
        self.count(kind)

    def count(self, kind: Kind, more: int = 1) -> None:
        """`more` of a kind, without words."""
        if more:
            self.counts[kind] = self.counts.get(kind, 0) + more

    def room(self, kind: Kind) -> int:
        """How many more of a kind will be kept in words."""
        return MOST_SHOWN - len(self.first.get(kind, ()))

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.counts)
