"""Whether a corpus is still the one that a finished dataset was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.dataset.sink import Sink
from embedstream.errors import CorpusDiffers
from embedstream.jobs import JobSpec
from embedstream.records import Manifest, ManifestPart
from embedstream.server.connection import mask

MOST_NAMED = 3
"""Parts that differ and are named; the others are counted."""

Sums = Mapping[tuple[int, int], str]
"""As `Sink.block_sums` gives them."""


def refuse_changed(
    manifest: Manifest,
    spec: JobSpec,
    sink: Sink,
    parts: Sequence[Part],
    on_position: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compare the corpus with what the manifest says of it; returns what is good to know.

    Files are read as bytes, once. Only if a sum differs, or is not known, are rows read, and compared by the sums of
    their blocks: the same rows in other bytes (compressed again, say) are the same corpus. A stream is read to its end.
    `on_position`: called with a part's index and how many bytes of it are read.

    Raises:
        CorpusDiffers: it is another corpus.
        InputError: it cannot be read.
        OutputError: the dataset's shards cannot be read.
    """
    told = on_position or (lambda _part, _read: None)
    suspects = {part.index for part in parts if not _has_sum(part, manifest.parts[part.index].sha256, told)}
    suspects |= {part.index for part in parts if any(other.index in suspects for other in part.made_of)}
    if not suspects:
        return []
    known, remarks, differing = sink.block_sums(), list[str](), list[str]()
    with DuplicateIndex() as index:
        for part in parts[: max(suspects) + 1]:
            if part.index not in suspects:
                for _ in part.ids(spec, index):  # which of them are repeated in later parts decides about those
                    pass
                continue
            then = manifest.parts[part.index]
            now = _read_rows(part, spec, index, known, then)
            if part.once and part.content is not None and part.content.sha256 == then.sha256:
                continue
            if now.same:
                if then.sha256 is not None:
                    remarks.append(f"{part.label}: other bytes than were embedded, but the same rows")
            elif then.sha256 is None and not now.compared and now.rows == then.rows + then.failed:
                remarks.append(f"{part.label}: as many rows as were embedded; whether they are the same is not known")
            else:
                differing.append(f"{part.label} {now.difference(then)}")
    if differing:
        raise CorpusDiffers(mask(spec.output), [*differing[:MOST_NAMED], *_more(len(differing) - MOST_NAMED)])
    return remarks


def _has_sum(part: Part, sha256: str | None, told: Callable[[int, int], None]) -> bool:
    if sha256 is None:
        return False
    content = part.read_content(lambda read: told(part.index, read))
    return content is not None and content.sha256 == sha256


def _more(count: int) -> Iterator[str]:
    if count > 0:
        yield f"and {count:,} more files"


@dataclass
class _Rows:
    """What a part holds now, compared with the blocks that were embedded."""

    rows: int = 0
    blocks: int = 0
    compared: bool = True
    """Whether the sums of all blocks are known."""
    others: int = 0
    """Rows of blocks that differ."""
    first: int | None = None
    """The first of these rows."""
    same: bool = False

    def difference(self, then: ManifestPart) -> str:
        was, rows = then.rows + then.failed, self.rows
        said = f"has {rows:,} rows as before" if rows == was else f"had {was:,} rows and has {rows:,}"
        if not self.compared:
            return f"{said}, in other bytes"
        if self.first is None:
            return said
        return f"{said}, of which {self.others:,} lie in blocks that differ, from row {self.first + 1:,} on"


def _read_rows(part: Part, spec: JobSpec, index: DuplicateIndex, known: Sums, then: ManifestPart) -> _Rows:
    now = _Rows()
    for block in part.blocks(spec, index):
        now.blocks = block.number + 1
        now.rows += block.total
        sum = known.get((part.index, block.number))
        if sum is None and block.number < then.blocks:
            now.compared = False
        elif sum != block.sum.hex():
            now.others += block.total
            if now.first is None and block.span is not None:
                now.first = block.span[0]
    now.same = now.compared and now.blocks == then.blocks and not now.others
    return now
