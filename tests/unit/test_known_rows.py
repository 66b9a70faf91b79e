"""What an update takes over of the older dataset: found by hash, in every kind of column as it lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from lab.dataset import Dataset, contents_of, dense, make_content, make_spec
from lab.results import EVERY_KIND

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_digest
from embedstream.errors import ModelError, OutputError
from embedstream.jobs import JobSpec, Update
from embedstream.records import Manifest
from embedstream_worker.calibration import rounded
from embedstream_worker.known_rows import KnownRows, known_rows, put_in


def made(tmp_path: Path, outputs: tuple[object, ...] = EVERY_KIND) -> tuple[FolderSink, Manifest]:
    """A dataset of two shards."""
    spec = make_spec(str(tmp_path))
    dataset = Dataset(FolderSink(str(tmp_path), spec), spec)
    for name, blocks in (("a", [(0, 0), (0, 2)]), ("b", [(0, 1), (1, 0)])):
        dataset.write(make_content(spec, name, blocks, 7, outputs=outputs))  # type: ignore[arg-type]
    return FolderSink(str(tmp_path)), dataset.end()


def updating(tmp_path: Path, manifest: Manifest, **changed: object) -> JobSpec:
    update = Update(manifest=manifest_digest(manifest), space=manifest.space)
    return make_spec(str(tmp_path), update=update, **changed)


def hashes_of(rows: pa.Table) -> Any:
    return rows.column("input_hash").combine_chunks()


def test_columns_of_every_kind_are_taken_over_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    sink, manifest = made(tmp_path)
    rows = contents_of([*sink.read()])
    known = KnownRows(sink, manifest, manifest.outputs, whole=False)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), 2))
    wanted = rows.take(pa.array(order))
    places = known.find(hashes_of(wanted))
    assert (places >= 0).all()
    taken = rounded(manifest.outputs, known.take(places))
    for name in taken.column_names:
        assert taken.column(name).combine_chunks().equals(wanted.column(name).combine_chunks()), name


def test_what_was_never_there_is_not_found(tmp_path: Path) -> None:
    sink, manifest = made(tmp_path, ())
    known = KnownRows(sink, manifest, manifest.outputs, whole=False)
    there = hashes_of(contents_of([*sink.read()])).to_pylist()
    half = [hash[:8] + bytes(8) for hash in there]
    hashes: Any = pa.array([*half, bytes(16), b"\xff" * 16, *there], pa.binary(16))
    assert (known.find(hashes) >= 0).tolist() == [False] * (len(there) + 2) + [True] * len(there)


def test_texts_that_were_cut_are_not_taken_over_by_a_job_that_wants_none_cut(tmp_path: Path) -> None:
    _, manifest = made(tmp_path, ())
    known, _ = known_rows(updating(tmp_path, manifest, on_long="error"), "space", manifest.outputs, (str(tmp_path),))
    assert known is not None
    assert len(known) == manifest.rows - manifest.truncated < manifest.rows


@pytest.mark.parametrize("what", ["space", "column"])
def test_why_nothing_can_be_taken_over_is_said(tmp_path: Path, what: str) -> None:
    _, manifest = made(tmp_path, ())
    outputs = manifest.outputs if what == "space" else (dense(name="other"),)
    known, why = known_rows(
        updating(tmp_path, manifest), "other" if what == "space" else "space", outputs, (str(tmp_path),)
    )
    assert known is None
    assert "embedded again" in why
    assert what in why


def test_another_dataset_than_the_one_that_the_job_began_with_is_refused(tmp_path: Path) -> None:
    sink, manifest = made(tmp_path, ())
    spec = updating(tmp_path, manifest)
    sink.finalize(msgspec.structs.replace(manifest, ended=manifest.ended + 1))
    with pytest.raises(ModelError, match="another run wrote a manifest meanwhile"):
        known_rows(spec, "space", manifest.outputs, (str(tmp_path),))


def test_a_dataset_beyond_the_workers_roots_is_not_read(tmp_path: Path) -> None:
    for folder in ("root", "beyond"):
        (tmp_path / folder).mkdir()
    _, manifest = made(tmp_path / "beyond", ())
    spec = make_spec(
        str(tmp_path / "root/out"),
        update=Update(manifest=manifest_digest(manifest), space="space", source=str(tmp_path / "beyond")),
    )
    with pytest.raises(OutputError, match="root"):
        known_rows(spec, "space", manifest.outputs, (str(tmp_path / "root"),))


def test_nothing_is_taken_of_a_file_that_was_changed_since(tmp_path: Path) -> None:
    sink, manifest = made(tmp_path, ())
    known = KnownRows(sink, manifest, manifest.outputs, whole=False)
    rows = contents_of([*sink.read()])
    path = tmp_path / manifest.shards[0].file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(OutputError, match="changed since"):
        known.take(known.find(hashes_of(rows)))


def test_values_are_put_into_their_rows_alone() -> None:
    columns = {"a": pa.chunked_array([[1, 2], [3, 4]]), "b": pa.array(["x"] * 4)}
    known = pa.table({"a": pa.chunked_array([[30], [10]])})
    put = put_in(columns, known, np.array([2, 0]))
    assert put["a"].to_pylist() == [10, 2, 30, 4]
    assert put["b"] is columns["b"]
