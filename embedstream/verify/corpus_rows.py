"""Whether the rows of a dataset are those of its corpus, read once more as its producer read it."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial

import numpy as np

from embedstream.dataset.input_hash import entered, text_digests
from embedstream.queue.blocks import Block
from embedstream.records import Manifest
from embedstream.verify.findings import MOST_SHOWN, Finding, Kind
from embedstream.verify.folder_output import FolderCheck, by_section
from embedstream.verify.locating import Place, locate
from embedstream.verify.places import Mask, Places, Rows
from embedstream.verify.rows import id_numbers, kept_numbers


class Listed:
    """Which blocks a manifest lists."""

    def __init__(self, manifest: Manifest) -> None:
        self._all = not manifest.partial
        self._runs: dict[int, list[tuple[int, int]]] = {}
        for run in sorted(run for shard in manifest.shards for run in shard.blocks):
            self._runs.setdefault(run.part, []).append((run.first, run.last))

    def has(self, part: int, block: int) -> bool:
        """Whether the rows of a block should be there: all of them, unless the dataset is partial."""
        if self._all:
            return True
        runs = self._runs.get(part, [])
        at = bisect_right(runs, (block, 1 << 62)) - 1
        return at >= 0 and block <= runs[at][1]


class CorpusCheck:
    """Compares blocks, in any order, with what a `FolderCheck` that was run kept of the dataset."""

    def __init__(self, check: FolderCheck) -> None:
        assert check.numbers is not None, "the dataset was read without what a comparison needs"
        self._check = check
        self._numbers = check.numbers
        self._findings = check.findings
        self._listed = Listed(check.manifest)
        self._unlocated: list[tuple[Kind, Place, str, str | None]] = []
        self.rows = 0
        """Rows of the corpus so far that must come out, refused ones included."""

    def add(self, block: Block, label: str) -> None:
        """Compare one block; `label` is its part's name in messages."""
        if not self._listed.has(block.part, block.number):
            return
        self.rows += block.total
        self._compare_rows(block, label)
        if block.refused:
            self._compare_refused(block, label)

    def _compare_rows(self, block: Block, label: str) -> None:
        part, batch, spec = block.part, block.rows, self._check.spec
        rows: Rows = batch.column("row").to_numpy()
        chunks: Rows = batch.column("chunk").to_numpy()
        good, failed = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
        there = np.zeros((len(rows), 3), np.uint64)
        for section, chosen in by_section(np.full(len(rows), part), chunks, len(spec.parts)):
            good[chosen] = self._check.good.remove(section, rows[chosen])
            failed[chosen] = self._check.failed.remove(section, rows[chosen])
            there[chosen] = self._numbers.get(section, rows[chosen])
        told = partial(self._told, part=part, rows=rows, chunks=chunks, label=label)
        ids = batch.column("id")
        told(Kind.NOT_IN_DATASET, bad=~(good | failed), ids=ids.to_pylist(), words="is not in the dataset")
        other_id = (good | failed) & (there[:, 0] != id_numbers(ids))
        told(Kind.OTHER_ID, bad=other_id, ids=ids.to_pylist(), words="has another id in the dataset")
        same = good & ~failed & ~other_id
        digests = text_digests(entered(batch, self._check.spec.query_field), self._check.manifest.prompt)
        texts = np.frombuffer(digests, np.uint64).reshape(-1, 2)[:, 0]
        other_text = same & (there[:, 1] != texts)
        words = "has another text than the one that was embedded"
        told(Kind.OTHER_TEXT, bad=other_text, ids=ids.to_pylist(), words=words)
        if spec.keep:
            other = same & (there[:, 2] != kept_numbers(batch, spec))
            words = f"has other values of {', '.join(spec.keep)} than the dataset"
            told(Kind.OTHER_FIELDS, bad=other, ids=ids.to_pylist(), words=words)

    def _compare_refused(self, block: Block, label: str) -> None:
        part, ids = block.part, [refusal.id for refusal in block.refused]
        rows = np.array([refusal.row for refusal in block.refused], np.int64)
        good, failed = self._check.good.remove(part, rows), self._check.failed.remove(part, rows)
        words = "is refused, and is not in the dataset's errors"
        told = partial(self._told, part=part, rows=rows, chunks=np.zeros(len(rows), np.int64), label=label, ids=ids)
        told(Kind.NOT_IN_DATASET, bad=~(good | failed), words=words)
        told(Kind.NOT_IN_CORPUS, bad=good & ~failed, words="is refused, and is in the dataset")

    def _told(
        self,
        kind: Kind,
        *,
        part: int,
        rows: Rows,
        chunks: Rows,
        bad: Mask,
        ids: list[str | None],
        label: str,
        words: str,
    ) -> None:
        """Count the rows in the mask; the first of a kind are told, once it is known which file they are in."""
        if not bad.any():
            return
        found = np.flatnonzero(bad)
        waiting = sum(other is kind for other, *_ in self._unlocated)
        told = found[: max(0, self._findings.room(kind) - waiting)]
        for at in told:
            place = Place(part, int(rows[at]), int(chunks[at]))
            self._unlocated.append((kind, place, f"{_named(label, place)}: {words}", ids[at]))
        self._findings.count(kind, len(found) - len(told))

    def finish(self, labels: list[str]) -> None:
        """Once every block is compared: name the rows that no block had, and where what is wrong lies."""
        extra = [
            (place, words)
            for places, words in ((self._check.good, "no such row"), (self._check.failed, "no such row to fail"))
            for place in self._left(places)
        ]
        wanted = {place for _, place, *_ in self._unlocated} | {place for place, _ in extra}
        located = locate(self._check.sink, self._check.manifest, wanted)
        nowhere = Finding(message="")
        for kind, place, message, id in self._unlocated:
            there = located.get(place, nowhere)
            other = f" ({there.id})" if kind is Kind.OTHER_ID and there.id is not None else ""
            self._findings.add(kind, message + other, there.file, there.row, id)
        for place, words in extra:
            there = located.get(place, nowhere)
            label = labels[place.part] if place.part < len(labels) else f"part {place.part}"
            message = f"{_named(label, place)}: {words} in the corpus"
            self._findings.add(Kind.NOT_IN_CORPUS, message, there.file, there.row, there.id)

    def _left(self, places: Places) -> list[Place]:
        left: list[Place] = []
        for section, rows in places:
            chunk, part = divmod(section, len(self._check.spec.parts))
            shown = rows[: MOST_SHOWN - len(left)]
            left += [Place(part, int(row), chunk) for row in shown]
            self._findings.count(Kind.NOT_IN_CORPUS, len(rows) - len(shown))
        return left


def _named(label: str, place: Place) -> str:
    return f"{label}:{place.row + 1}{f' chunk {place.chunk}' if place.chunk else ''}"
