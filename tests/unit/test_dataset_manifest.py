"""The manifest: what it says, and the shards it refuses to be built from."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.dataset import DIM, make_content, make_error, make_spec, make_status

from embedstream.dataset.manifest import (
    SHARDS_AT_ONCE,
    block_runs,
    build_manifest,
    decode_manifest,
    encode_manifest,
    manifest_pieces,
    manifest_spec,
    refuse_other_spec,
)
from embedstream.errors import ManifestDamaged, OutputError, SpecDiffers
from embedstream.jobs import JobState
from embedstream.records import BlockRecord, BlockRun, ShardRecord

SPEC = make_spec("/out")


def make_record(name: str, blocks: list[tuple[int, int]], errors: int = 0, **changed: Any) -> ShardRecord:
    rows = [make_error(row=100 + i) for i in range(errors)]
    return make_content(SPEC, name, blocks, errors=rows, bytes=10, sha256="00", **changed).record


def test_a_complete_manifest_adds_its_shards_up() -> None:
    shards = [make_record("b", [(1, 0), (0, 1)], errors=2), make_record("a", [(0, 0)], dtype="bfloat16")]
    manifest = build_manifest(make_status(SPEC, 3), shards, JobState.COMPLETED, 1010.5)

    assert (manifest.state, manifest.partial, manifest.job) == ("completed", False, SPEC.job)
    assert (manifest.rows, manifest.failed, manifest.truncated, manifest.tokens, manifest.padded) == (9, 2, 3, 36, 45)
    assert (manifest.created, manifest.ended, manifest.engines) == (1000.0, 1010.5, ("hashing",))
    assert [(p.name, p.blocks, p.rows, p.failed) for p in manifest.parts] == [
        ("/data/a.jsonl", 2, 6, 0),
        ("/data/b.jsonl", 1, 3, 2),
    ]
    assert [(s.name, s.rows, s.failed, s.dtype, s.blocks) for s in manifest.shards] == [
        ("a", 3, 0, "bfloat16", (BlockRun(0, 0, 0),)),
        ("b", 6, 2, "float32", (BlockRun(0, 1, 1), BlockRun(1, 0, 0))),
    ]
    output = manifest.outputs[0]
    assert (output.name, output.kind, output.dtype, output.dim, output.normalized) == (
        "embedding", "dense", "float32", DIM, True,
    )  # fmt: skip
    assert manifest_spec(manifest) == SPEC


def test_a_manifest_reads_back_as_it_was() -> None:
    manifest = build_manifest(make_status(SPEC, 1), [make_record("a", [(0, 0)])], JobState.COMPLETED, 2.0)
    assert decode_manifest(encode_manifest(manifest), "x") == manifest
    assert encode_manifest(manifest) == msgspec.json.encode(manifest) + b"\n"
    spaced = msgspec.json.format(encode_manifest(manifest), indent=2)
    assert decode_manifest(spaced, "x") == manifest


def test_a_manifest_of_many_shards_is_written_in_order_and_piece_by_piece() -> None:
    count = 2 * SHARDS_AT_ONCE + 1
    shards = [make_record(f"s{n:04}", [(0, n)]) for n in reversed(range(count))]
    manifest = build_manifest(make_status(SPEC, count), shards, JobState.COMPLETED, 2.0)
    pieces = list(manifest_pieces(manifest))
    assert max(map(len, pieces)) < sum(map(len, pieces)) / 2
    assert b"".join(pieces) == msgspec.json.encode(manifest) + b"\n"
    assert [shard.name for shard in decode_manifest(b"".join(pieces), "x").shards] == [s.name for s in shards[::-1]]


@pytest.mark.parametrize(
    "blocks", [b'"all"', b"[[0,0,0]]", b'[{"part":0,"first":0}]', b'[{"part":0,"first":0,"last":-}]']
)
def test_a_manifest_with_damaged_blocks_is_refused(blocks: bytes) -> None:
    manifest = build_manifest(make_status(SPEC, 1), [make_record("a", [(0, 0)])], JobState.COMPLETED, 2.0)
    whole = encode_manifest(manifest)
    assert whole.count(b'[{"part":0,"first":0,"last":0}]') == 1
    with pytest.raises(ManifestDamaged, match="x: the manifest cannot be read"):
        decode_manifest(whole.replace(b'[{"part":0,"first":0,"last":0}]', blocks), "x")


def test_a_manifest_names_the_files_of_its_shards_with_their_sums() -> None:
    shards = [make_record("a", [(0, 0)], errors=2, errors_sha256="01"), make_record("b", [(0, 1)])]
    manifest = build_manifest(make_status(SPEC, 2), shards, JobState.COMPLETED, 2.0)
    first, second = json.loads(encode_manifest(manifest))["shards"]
    assert (first["file"], first["sha256"], second["file"]) == ("part-a.parquet", "00", "part-b.parquet")
    assert first["errors"] == {"rows": 2, "file": "_errors-a.arrow", "sha256": "01"}
    assert "errors" not in second


@pytest.mark.parametrize("file", ["part-b.parquet", "../part-a.parquet", "/etc/passwd", "_errors-b.arrow"])
def test_a_manifest_that_names_other_files_than_its_shards_own_is_refused(file: str) -> None:
    record = make_record("a", [(0, 0)], errors=1, errors_sha256="01")
    whole = encode_manifest(build_manifest(make_status(SPEC, 1), [record], JobState.COMPLETED, 2.0))
    for own in (b"part-a.parquet", b"_errors-a.arrow"):
        with pytest.raises(ManifestDamaged, match=f"it lists {file} as the"):
            decode_manifest(whole.replace(own, file.encode()), "x")


def test_making_and_reading_a_manifest_keeps_little_more_than_it_says() -> None:
    """No two blocks of a shard follow each other: a manifest can say no more of a job of that size."""
    shards, each = 512, 64
    records = (make_record(f"s{n:04}", [(0, n + shards * i) for i in range(each)]) for n in range(shards))
    tracemalloc.start()
    try:
        manifest = build_manifest(make_status(SPEC, shards * each), records, JobState.COMPLETED, 2.0)
        said = sum(len(piece) for piece in manifest_pieces(manifest))
        made = tracemalloc.get_traced_memory()[1]
        data = encode_manifest(manifest)
        tracemalloc.reset_peak()
        again = decode_manifest(data, "x")
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert again == manifest
    assert made < 5 * said, f"{made} bytes for a manifest of {said}"
    assert read < 5 * said, f"{read} bytes for both and {said} bytes of JSON"


def test_a_manifest_holds_no_password_and_still_fits_its_job() -> None:
    spec = make_spec("redis://me:secret@host:6379/0?prefix=d:")
    manifest = build_manifest(make_status(spec, 0), [], JobState.COMPLETED, 1010.5)
    assert b"secret" not in encode_manifest(manifest)
    refuse_other_spec(spec.output, manifest_spec(manifest), spec)
    with pytest.raises(SpecDiffers, match="prompt"):
        refuse_other_spec(spec.output, manifest_spec(manifest), msgspec.structs.replace(spec, prompt="q: "))


def test_a_manifest_of_a_newer_format_is_not_guessed_at() -> None:
    manifest = build_manifest(make_status(SPEC, 0), [], JobState.CANCELLED, 2.0)
    with pytest.raises(OutputError, match="upgrade it"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, v=2)), "x")


@pytest.mark.parametrize(("sealed", "blocks"), [(False, 1), (True, 2)])
def test_a_job_that_ended_early_is_partial_and_does_not_know_its_parts(sealed: bool, blocks: int) -> None:
    status = make_status(SPEC, blocks, sealed=sealed)
    manifest = build_manifest(status, [make_record("a", [(0, 0)])], JobState.CANCELLED, 2.0)
    assert manifest.partial
    assert [part.blocks for part in manifest.parts] == [-1, -1]


def test_a_job_cancelled_before_its_first_shard_has_a_manifest() -> None:
    manifest = build_manifest(make_status(SPEC, 5, space=""), [], JobState.CANCELLED, 2.0)
    assert (manifest.rows, manifest.shards, manifest.space, manifest.outputs) == (0, (), "", ())


def test_a_completed_job_that_lacks_blocks_is_refused() -> None:
    with pytest.raises(OutputError, match="hold 1 of 2 blocks"):
        build_manifest(make_status(SPEC, 2), [make_record("a", [(0, 0)])], JobState.COMPLETED, 2.0)


def test_a_block_in_two_shards_is_refused() -> None:
    shards = [make_record("a", [(0, 0), (0, 1)]), make_record("b", [(0, 1)])]
    with pytest.raises(OutputError, match="block 0:1 lies in two shards"):
        build_manifest(make_status(SPEC, 3), shards, JobState.COMPLETED, 2.0)


@pytest.mark.parametrize("place", [(2, 0), (-1, 0), (0, -1), (0, 2**26)])
def test_a_block_that_no_job_has_is_refused(place: tuple[int, int]) -> None:
    with pytest.raises(OutputError, match=r"holds part -?\d of 2 parts|no part has such a block"):
        build_manifest(make_status(SPEC, 1), [make_record("a", [place])], JobState.CANCELLED, 2.0)


def test_shards_of_two_spaces_are_refused() -> None:
    shards = [make_record("a", [(0, 0)]), make_record("b", [(0, 1)], space="elsewhere")]
    with pytest.raises(OutputError, match="cannot be compared"):
        build_manifest(make_status(SPEC, 2), shards, JobState.COMPLETED, 2.0)


def test_a_shard_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(OutputError, match="shard a does not add up to its blocks"):
        build_manifest(make_status(SPEC, 1), [make_record("a", [(0, 0)], rows=7)], JobState.COMPLETED, 2.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), unique=True))
def test_runs_name_every_block_once_and_never_touch(places: list[tuple[int, int]]) -> None:
    runs = block_runs(BlockRecord(part, block, 0, 0, 0, "") for part, block in places)
    assert [(run.part, block) for run in runs for block in range(run.first, run.last + 1)] == sorted(places)
    assert all(a.part < b.part or a.last + 1 < b.first for a, b in pairwise(runs))
