"""A dataset and its next generation, in files: which files count, and what older jobs may still do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from lab.dataset import Dataset, dense, make_content, make_spec, make_status

from embedstream.dataset.changes import read_changes
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_digest
from embedstream.errors import OutputError
from embedstream.jobs import JobSpec, JobState, Update
from embedstream.lifecycle.completing import finalize
from embedstream.lifecycle.update_completing import finalize_update
from embedstream.records import Manifest, ShardRecord


@pytest.fixture
def base(tmp_path: Path) -> Dataset:
    """A finished dataset of two shards."""
    spec = make_spec(str(tmp_path))
    dataset = Dataset(FolderSink(str(tmp_path), spec), spec)
    for name, part in (("a", 0), ("b", 1)):
        dataset.write(make_content(spec, name, [(part, 0)]))
    dataset.end()
    return dataset


def updating(base: Dataset, corpus: str = "") -> JobSpec:
    manifest = base.sink.read_manifest()
    assert manifest is not None
    update = Update(manifest=manifest_digest(manifest), space=manifest.space, corpus=corpus)
    return msgspec.structs.replace(base.spec, update=update)


def written(base: Dataset, spec: JobSpec, name: str) -> list[ShardRecord]:
    """One shard of an update, that has the first part alone."""
    return [FolderSink(base.spec.output, spec).write_shard(make_content(spec, name, [(0, 0)]))]


def updated(base: Dataset, name: str) -> Manifest:
    spec = updating(base)
    sink = FolderSink(base.spec.output, spec)
    made = finalize_update(sink, make_status(spec, 1), written(base, spec, name), 2000.0, ())
    assert made is not None
    return made


def names(base: Dataset) -> set[str]:
    return {path.name for path in Path(base.spec.output).iterdir() if not path.name.startswith("_README")}


def test_only_the_newest_generations_files_stay(base: Dataset) -> None:
    first = updated(base, "a2")
    second = updated(base, "a3")
    assert (first.generation, second.generation) == (1, 2)
    assert (first.changes[0].removed, second.changes[1].removed) == (3, 0)
    assert names(base) == {"_manifest.json", "part-a3.parquet", *(changes.file for changes in second.changes)}


def test_an_update_comes_to_nothing_if_another_one_was_faster(base: Dataset) -> None:
    slow = updating(base, corpus="another")
    records = written(base, slow, "slow")
    made = updated(base, "fast")
    assert finalize_update(FolderSink(base.spec.output, slow), make_status(slow, 1), records, 2000.0, ()) is None
    assert base.sink.read_manifest() == made


def test_files_of_updates_that_came_to_nothing_go_and_those_of_one_that_begins_stay(base: Dataset) -> None:
    written(base, updating(base, corpus="another"), "void")
    made = updated(base, "a2")
    assert "part-void.parquet" not in names(base)
    written(base, updating(base), "begun")
    base.sink.mend(made)
    assert "part-begun.parquet" in names(base)


def test_an_older_job_that_redis_takes_for_unfinished_does_not_bring_its_generation_back(base: Dataset) -> None:
    made = updated(base, "a2")
    for spec in (base.spec, msgspec.structs.replace(base.spec, keep=("lang", "stars"))):
        status = make_status(spec, 2)
        assert finalize(base.sink, status, base.records, JobState.COMPLETED, 3000.0) == made
    assert base.sink.read_manifest() == made


def test_changes_that_were_spoiled_are_refused(base: Dataset) -> None:
    made = updated(base, "a2")
    path = Path(base.spec.output, made.changes[0].file)
    assert read_changes(FolderSink(base.spec.output), made.changes[0]).num_rows == 3
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(OutputError, match="was changed since"):
        read_changes(FolderSink(base.spec.output), made.changes[0])


def test_generations_are_compared_in_pieces_as_in_one(base: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = updated(base, "a2")
    monkeypatch.setattr("embedstream.dataset.changes.ROWS_AT_ONCE", 2)
    spec = updating(base)
    content = make_content(spec, "b4", [(1, 0), (0, 0)])
    records = [FolderSink(base.spec.output, spec).write_shard(content)]
    pieces = finalize_update(FolderSink(base.spec.output, spec), make_status(spec, 2), records, 2000.0, ())
    assert pieces is not None
    (first, second) = pieces.changes
    assert first == whole.changes[0]
    assert (second.added, second.changed, second.removed) == (3, 0, 0)
    listed = read_changes(FolderSink(base.spec.output), second)
    assert sorted(map(str, listed["id"].to_pylist())) == ["1-0", "1-1", "1-2"]


def test_with_other_columns_of_results_every_row_is_changed(base: Dataset) -> None:
    spec = updating(base)
    sink = FolderSink(base.spec.output, spec)
    records = [sink.write_shard(make_content(spec, "a2", [(0, 0)], outputs=[dense(dtype="float16")]))]
    made = finalize_update(sink, make_status(spec, 1), records, 2000.0, ())
    assert made is not None
    assert (made.changes[0].changed, made.changes[0].removed) == (3, 3)
