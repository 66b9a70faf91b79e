"""From judged rows to the blocks of a part: duplicates are refused, the rest is packed in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath

from embedstream.corpus.chunking import chunker_of
from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.corpus.records import Outcome, Record, duplicate_refusal
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Block, Refusal
from embedstream.queue.packing import Packer


def cut_part(
    part: int,
    batches: Iterable[Sequence[Outcome]],
    spec: JobSpec,
    duplicates: DuplicateIndex,
    on_refusal: Callable[[Refusal], None] | None = None,
) -> Iterator[Block]:
    """The blocks of a part, from how its rows ended, in row order and in batches of any size.

    The blocks do not depend on how the rows are batched. `on_refusal` is called with each refused row, once a reading.
    """
    packer, chunker = Packer(part, spec.keep), None if spec.chunking is None else chunker_of(spec)
    for outcomes in batches:
        positions = _check_ids(part, outcomes, duplicates)
        earlier = iter(positions)
        cut = iter(() if chunker is None else chunker.chunks(_first_ones(outcomes, positions)))
        for outcome in outcomes:
            block: Block | None = None
            if outcome is None:
                packer.skip()
            elif isinstance(outcome, Refusal):
                block = _refuse(packer, outcome, on_refusal)
            elif (position := next(earlier)) is not None:
                block = _refuse(packer, duplicate_refusal(outcome, _where(position, part, spec)), on_refusal)
            elif chunker is not None:
                chunks = next(cut)
                if isinstance(chunks, Refusal):
                    block = _refuse(packer, chunks, on_refusal)
                for chunk in () if isinstance(chunks, Refusal) else chunks:
                    full = packer.add(outcome.row, outcome.id, *chunk)
                    if full is not None:
                        yield full
            else:
                block = packer.add(outcome.row, outcome.id, outcome.text, outcome.text_bytes, outcome.kept)
            if block is not None:
                yield block
    last = packer.finish()
    if last is not None:
        yield last


def enter_ids(
    part: int, batches: Iterable[Sequence[Outcome]], duplicates: DuplicateIndex
) -> Iterator[list[tuple[int, Position]]]:
    """Enter the ids of a part, as `cut_part` would, without making blocks of it; yields for each batch the rows whose
    ids were used before, and where."""
    for outcomes in batches:
        rows = [outcome.row for outcome in outcomes if type(outcome) is Record]
        earlier = _check_ids(part, outcomes, duplicates)
        yield [(row, position) for row, position in zip(rows, earlier, strict=True) if position is not None]


def _first_ones(outcomes: Sequence[Outcome], positions: Sequence[Position | None]) -> list[Record]:
    """The records whose ids were not used before."""
    records = (outcome for outcome in outcomes if type(outcome) is Record)
    return [record for record, position in zip(records, positions, strict=True) if position is None]


def _check_ids(part: int, outcomes: Sequence[Outcome], duplicates: DuplicateIndex) -> list[Position | None]:
    records = [outcome for outcome in outcomes if type(outcome) is Record]
    return duplicates.check(part, [record.row for record in records], [record.id for record in records])


def _refuse(packer: Packer, refusal: Refusal, on_refusal: Callable[[Refusal], None] | None) -> Block | None:
    if on_refusal is not None:
        on_refusal(refusal)
    return packer.refuse(refusal)


def _where(position: Position, part: int, spec: JobSpec) -> str:
    """A position in words that depend on the spec alone: refusals are part of a block's sum."""
    source = spec.parts[position.part]
    if source == "records":
        return f"record {position.row}"
    line = f"{'row' if _is_table(source) else 'line'} {position.row + 1}"
    if position.part == part:
        return line
    name = PurePath(source).name or source
    shared = any(other != source and other.endswith(f"/{name}") for other in spec.parts)
    return f"{source if shared else name}, {line}"


def _is_table(source: str) -> bool:
    """By its name alone: whether its rows are no lines."""
    name = source.partition("?")[0].removesuffix(".gz").removesuffix(".zst")
    return name.endswith((".parquet", ".arrow", ".feather", ".ipc", ".csv", ".tsv", ".tab")) or "*" in name
