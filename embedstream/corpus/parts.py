"""One input of a corpus: rows that can be read from the beginning, and cut into blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from embedstream.corpus.cutting import cut_part, enter_ids
from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.corpus.records import Outcome
from embedstream.jobs import JobSpec, KeptType
from embedstream.queue.blocks import Block, Refusal
from embedstream.records import PartContent


class Part(ABC):
    """A file, an object, a stream, or Python records."""

    content: PartContent | None = None
    """What was read when a reading last came to its end; None for what are no bytes that others can read."""

    advice: str | None = None
    """What the user should know before the job is made."""

    made_of: Sequence[Part] = ()
    """Parts without rows of their own, of which this one's rows are made, too."""

    kept_types: Mapping[str, KeptType] = MappingProxyType({})
    """Types of the kept columns, once it was looked into; empty for a part without rows."""

    def __init__(self, index: int, name: str, label: str, size: int | None = None, *, once: bool = False) -> None:
        self.index = index
        self.name = name
        """What stands for this part in `JobSpec.parts`."""
        self.label = label
        """What stands for it in messages."""
        self.size = size
        """Bytes of the file, None for a stream and for records."""
        self.once = once
        """Whether it can be read only once: a second reading raises `InputError`."""

    def read_content(self, on_position: Callable[[int], None]) -> PartContent | None:  # noqa: ARG002
        """What all bytes of the source are now, without looking at rows; None if only reading the rows can tell.

        Raises:
            InputError: the source cannot be read to its end.
        """
        return None

    @abstractmethod
    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        """How the rows end, from the first on, some at a time: the same each time as long as the source stays as it is.

        `on_position` is told how many bytes of the source are read, to compare with `size`.

        Raises:
            InputError: the source cannot be read to its end, or not a second time.
        """

    def blocks(
        self,
        spec: JobSpec,
        duplicates: DuplicateIndex,
        on_refusal: Callable[[Refusal], None] | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> Iterator[Block]:
        """Read the part from its beginning, as blocks. `on_refusal` is called with every refused row.

        Raises as `outcomes` does.
        """
        return cut_part(self.index, self.outcomes(spec, on_position), spec, duplicates, on_refusal)

    def ids(self, spec: JobSpec, duplicates: DuplicateIndex) -> Iterator[list[tuple[int, Position]]]:
        """Read the part for nothing but its ids, which decide about those of later parts; see `enter_ids`.

        Raises as `outcomes` does.
        """
        return enter_ids(self.index, self.outcomes(spec), duplicates)
