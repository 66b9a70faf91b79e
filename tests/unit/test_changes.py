"""What an update changed: two generations compared row by row, whichever columns they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow.compute as pc
import pytest
from lab.dataset import Dataset, make_content, make_spec

from embedstream.dataset import changes
from embedstream.dataset.changes import read_changes, write_changes
from embedstream.dataset.folder import FolderSink
from embedstream.jobs import Chunking
from embedstream.records import NO_BLOCKS, Changes, Manifest

TYPES: dict[str, Any] = {"stars": "int64", "share": "float64", "is.new": "bool"}

ROWS = [(0, 0), (0, 1), (1, 0)]


def generation(tmp_path: Path, name: str, blocks: list[tuple[int, int]], **settings: Any) -> Manifest:
    """One of three rows a block, in a folder that all of them lie in; its rows' texts and fields depend on their places
    alone."""
    spec = make_spec(str(tmp_path), **settings)
    dataset = Dataset(FolderSink(str(tmp_path), spec), spec)
    dataset.write(make_content(spec, name, blocks))
    manifest = dataset.end()
    (tmp_path / "_manifest.json").unlink()
    return manifest


def compared(tmp_path: Path, old: Manifest, new: Manifest) -> tuple[Changes, dict[str, str]]:
    """What is counted, and the change of each row by its id."""
    sink = FolderSink(str(tmp_path))
    found = write_changes(sink, old, new)
    table = read_changes(sink, found)
    ids, kinds = (table.column(name).to_pylist() for name in ("id", "change"))
    return found, dict(zip(ids, kinds, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [changes.ROWS_AT_ONCE, 2], ids=["in memory", "in pieces on the disk"])
def test_rows_that_are_new_gone_or_have_other_fields_are_listed_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(changes, "ROWS_AT_ONCE", most)
    kept = {"keep": ("lang", *TYPES), "keep_types": TYPES}
    old = generation(tmp_path, "a", [(0, 0), (0, 1)], **kept)
    new = generation(tmp_path, "b", [(0, 1), (1, 0)], **kept)
    counts, rows = compared(tmp_path, old, new)
    assert (counts.added, counts.changed, counts.removed) == (3, 0, 3)
    assert rows == dict.fromkeys(["0-0", "0-1", "0-2"], "removed") | dict.fromkeys(["1-0", "1-1", "1-2"], "added")


@pytest.mark.parametrize("field", [*TYPES, "lang"])
@pytest.mark.parametrize("way", [1, -1], ids=["added", "left out"])
def test_a_field_that_only_one_generation_has_makes_rows_changed_that_have_a_value_there(
    tmp_path: Path, field: str, way: int
) -> None:
    without = generation(tmp_path, "a", ROWS, keep=())
    types = {field: TYPES[field]} if field in TYPES else {}
    having = generation(tmp_path, "b", ROWS, keep=(field,), keep_types=types)
    _, rows = compared(tmp_path, *[without, having][::way])
    [table] = FolderSink(str(tmp_path)).batches("part-b.parquet", ["id", field], 100)
    valid = table.filter(pc.is_valid(table.column(field)))
    assert rows == dict.fromkeys(valid.column("id").to_pylist(), "changed")


def test_texts_that_are_cut_into_chunks_from_now_on_are_changed(tmp_path: Path) -> None:
    whole = generation(tmp_path, "a", ROWS)
    cut = generation(tmp_path, "b", ROWS, chunking=Chunking(tokens=8))
    counts, _ = compared(tmp_path, whole, cut)
    assert (counts.added, counts.changed, counts.removed) == (0, 9, 0)


def test_all_rows_that_stay_are_changed_if_their_vectors_cannot_be_compared(tmp_path: Path) -> None:
    old = generation(tmp_path, "a", [(0, 0), (0, 1)])
    new = msgspec.structs.replace(generation(tmp_path, "b", [(0, 1), (1, 0)]), space="another")
    counts, _ = compared(tmp_path, old, new)
    assert (counts.added, counts.changed, counts.removed) == (3, 3, 3)


def test_a_row_that_failed_and_was_run_again_is_changed_as_readers_of_the_older_generation_may_lack_it(
    tmp_path: Path,
) -> None:
    old = generation(tmp_path, "a", [(0, 0), (0, 1)])
    [retried] = generation(tmp_path, "b", [(1, 0)]).shards
    old = msgspec.structs.replace(old, rows=9, shards=(*old.shards, msgspec.structs.replace(retried, runs=NO_BLOCKS)))
    new = generation(tmp_path, "c", ROWS)
    _, rows = compared(tmp_path, old, new)
    assert rows == dict.fromkeys(["1-0", "1-1", "1-2"], "changed")
