"""What an export goes into: the seam that every target has, and how a target says what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from embedstream.dataset.values import Vectors
from embedstream.errors import OutputError
from embedstream_producer.exporting.rows import Key, Rows, Source

MARK = "embedstream"
"""Under this key a target keeps its `Origin`."""


class Target(Protocol):
    """One place that is searched. It is made of its address and the `Source`, and touches nothing before `check`."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What its library raises where the place cannot be reached, read or written."""

    def check(self) -> bool:
        """Refuse a place that holds something else; whether an export lies there. Changes nothing.

        Raises `OutputError`.
        """

    def write(self, rows: Iterator[Rows]) -> None:
        """Make the place if need be, and put all rows there; those of an earlier export of the dataset are replaced by
        their ids."""


@runtime_checkable
class Updatable(Target, Protocol):
    """One whose rows can be replaced one by one."""

    def remove(self, keys: Sequence[Key]) -> None:
        """Remove these rows, as far as they are there."""

    def merge(self, rows: Iterator[Rows]) -> None:
        """Put these rows there, in place of those of the same ids."""


@runtime_checkable
class Approximate(Target, Protocol):
    """One whose searches may miss rows, so that it is asked how many."""

    def search(self, queries: Vectors, k: int) -> list[list[Key]]:
        """The `k` rows nearest to each of the queries, by the cosine, or of bits by their Hamming distance."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a target holds: kept there, and compared before anything is written."""

    job: str
    """That of the first generation: an updated dataset is the same."""
    space: str
    """Vectors of two spaces cannot be compared."""
    column: str
    vectors: str
    """Their dtype and dimensions."""
    payload: dict[str, str]
    """Names and types of what goes with them."""

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()


def origin_of(source: Source) -> Origin:
    """What an export of the source is."""
    output = source.output
    return Origin(
        job=(*source.manifest.before, source.manifest.job)[0],
        space=source.manifest.space,
        column=output.name,
        vectors=f"{output.dtype}[{output.dim}]",
        payload={field.name: str(field.type) for field in source.payload},
    )


def refuse_other(where: str, found: object, wanted: Origin, ignored: Sequence[str] = ()) -> None:
    """Raise `OutputError` unless `found`, what lies there under `MARK`, is the wanted origin.

    `ignored`: fields that may differ. `where`: the place, masked.
    """
    try:
        text = found.decode() if isinstance(found, bytes) else found
        origin = msgspec.json.decode(text, type=Origin) if isinstance(text, str) else msgspec.convert(found, Origin)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise OutputError(f"{where}: holds something that embed-export did not write: choose another place") from None
    for field in Origin.__struct_fields__:
        there, here = getattr(origin, field), getattr(wanted, field)
        if there != here and field not in ignored:
            raise OutputError(
                f"{where}: holds an export with {field} {_shown(there)}, and this dataset has {_shown(here)}: choose "
                f"another place, or remove what lies there"
            )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, dict) else str(value)
