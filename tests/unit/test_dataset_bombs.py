"""A dataset of a few kilobytes takes some megabytes of those who read it, whatever it says."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lab.arrow_memory import arrow_memory
from lab.dataset import DIM, dense, vectors
from lab.dataset_bombs import LONG, ROWS, long_texts, one_long_vector, write_dataset

from embedstream.api.search import search
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.schema import output_fields
from embedstream.errors import OutputError
from embedstream.settings import MIB
from embedstream.verify.findings import Findings, Kind
from embedstream.verify.folder_output import FolderCheck
from embedstream_coordinator.merging import Group, write_group


@contextlib.contextmanager
def bounded(most: int = 200 * MIB) -> Iterator[None]:
    """Nothing in here takes more, of Arrow and Python together."""
    tracemalloc.start()
    try:
        with arrow_memory() as arrow:
            yield
            peak = arrow() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak:,} bytes"


def find(sink: FolderSink) -> None:
    hits = search(sink.output, {"dense": vectors(1)}, 3)
    assert [hit.text for hit in hits] == [LONG] * 3


def verify(sink: FolderSink) -> None:
    manifest, findings = sink.read_manifest(), Findings()
    assert manifest is not None
    FolderCheck(sink, manifest, findings, compare=True).run()
    assert set(findings.counts) == {Kind.OTHER_TEXT}


def read(sink: FolderSink) -> None:
    assert sum(batch.num_rows for batch in sink.read()) == ROWS


def merge(sink: FolderSink) -> None:
    manifest = sink.read_manifest()
    assert manifest is not None
    [shard] = manifest.shards
    with pytest.raises(OutputError, match=r"have more than [\d,]+ bytes once decompressed"):
        write_group(sink, manifest, Group("merged", {shard.name: shard.blocks}))


@pytest.mark.slow
@pytest.mark.parametrize("use", [find, verify, read, merge])
def test_one_long_text_that_all_rows_name(use: Callable[[FolderSink], None], tmp_path: Path) -> None:
    spec = write_dataset(tmp_path / "out", long_texts)
    [shard] = (tmp_path / "out").glob("part-*")
    assert shard.stat().st_size < 600_000
    with bounded(400 * MIB if use is merge else 200 * MIB):
        use(FolderSink(spec.output, spec))


@pytest.mark.slow
def test_a_vector_of_thirty_million_numbers_is_refused_unread(tmp_path: Path) -> None:
    spec = write_dataset(tmp_path / "out", one_long_vector)
    sink = FolderSink(spec.output, spec)
    says = r"part-a.parquet: column embedding.list.element has a row of 30,000,000 values, more than the 16,777,216"
    with bounded(60 * MIB):
        with pytest.raises(OutputError, match=says):
            list(sink.read())
        with pytest.raises(OutputError, match=says):
            search(sink.output, {"dense": vectors(1)})


def wider(data: Any) -> Any:
    type: Any = output_fields(dense(DIM + 1))[0].type
    numbers: Any = pa.array(vectors(len(data), dim=DIM + 1).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(numbers, type=type)
    at = data.schema.get_field_index("embedding")
    return data.set_column(at, pa.field("embedding", type, nullable=False), column)


def test_vectors_of_another_width_than_the_manifest_says_are_not_searched(tmp_path: Path) -> None:
    spec = write_dataset(tmp_path / "out", wider, same_schema=False)
    with pytest.raises(OutputError, match=r"column embedding is fixed_size_list<.*>\[9\], the manifest says .*\[8\]"):
        search(spec.output, {"dense": vectors(1)})
