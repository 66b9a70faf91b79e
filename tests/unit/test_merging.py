"""A merged shard is written from its own rows alone, a row group at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from lab.verify import Maker, make_spec, write_lines

from embedstream.dataset.folder import FolderSink
from embedstream.records import Manifest
from embedstream_coordinator import merging
from embedstream_coordinator.compaction import plan_groups

SHARDS, GROUPS = 16, 8


@pytest.fixture
def interleaved(tmp_path: Path) -> tuple[FolderSink, Manifest]:
    """A dataset whose blocks were dealt out to many workers, so that a merged shard has a few blocks of each."""
    write_lines(tmp_path / "a.jsonl", 32_000)
    spec = make_spec(tmp_path / "out", [tmp_path / "a.jsonl"])
    sink = FolderSink(spec.output, spec)
    sink.check()
    maker = Maker(spec, sink)
    blocks = maker.blocks()
    for i in range(SHARDS):
        maker.write(blocks[i::SHARDS])
    return sink, maker.end()


MERGE = """
import sys
import pyarrow as pa
from embedstream_coordinator.compaction import open_finished, plan_groups
from embedstream_coordinator.merging import write_group
sink, manifest = open_finished(sys.argv[1])
groups = plan_groups(manifest, sum(shard.bytes for shard in manifest.shards) // int(sys.argv[2]))
print(len(groups[0].blocks), write_group(sink, manifest, groups[0]).name, pa.default_memory_pool().max_memory())
"""
"""In a process of its own, which counts what Arrow takes from its start on."""


@pytest.mark.slow
def test_merging_holds_the_rows_of_its_own_blocks_and_not_those_beside_them(
    interleaved: tuple[FolderSink, Manifest],
) -> None:
    sink, _ = interleaved
    command = [sys.executable, "-c", MERGE, sink.output, str(GROUPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    sources, name, taken = done.stdout.split()
    assert int(sources) >= SHARDS // 2, "a few blocks of each shard"
    held: Any = pq.read_table(sink.files.path(f"part-{name}.parquet"))
    assert int(taken) < 4 * held.nbytes, f"{int(taken) / held.nbytes:.1f} times what the shard holds"


def test_a_merged_shard_is_written_row_group_by_row_group_in_order(
    interleaved: tuple[FolderSink, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "ROW_GROUP_BYTES", 100_000)
    sink, manifest = interleaved
    (group,) = plan_groups(manifest, 1 << 30)
    record = merging.write_group(sink, manifest, group)
    with pq.ParquetFile(sink.files.path(f"part-{record.name}.parquet")) as file:
        assert file.num_row_groups > 10
        table: Any = file.read()
    places = list(zip(table["part"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert (len(places), places) == (manifest.rows, sorted(places))
    assert sink.files.sha256(f"part-{record.name}.parquet") == (record.bytes, record.sha256)
