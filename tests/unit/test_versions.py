"""Data of another format version is refused, before it is looked at, in one sentence: which side to upgrade."""

from __future__ import annotations

import json
from pathlib import Path

import fakeredis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.broker import Lab

from embedstream.dataset.manifest import decode_manifest
from embedstream.dataset.parquet import read_footer
from embedstream.errors import BlockError, EmbedstreamError, ManifestDamaged, OutputError, UsageError
from embedstream.jobs import FORMAT_VERSION, decode_spec
from embedstream.queue.blocks import decode_block
from embedstream.queue.queues import look_at_queue
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.jobs import Jobs

NEWER, OLDER = FORMAT_VERSION + 1, FORMAT_VERSION - 1

UNLIKE_OURS = {"shards": "many", "outputs": {"a": 1}, "queue": 3}
"""What no decoder of this version takes: were it looked at before the version, something else would be said."""


def as_block(version: int) -> None:
    decode_block({b"v": str(version).encode(), b"rows": b"some"}, ())


def as_spec(version: int) -> None:
    decode_spec(json.dumps({**UNLIKE_OURS, "v": version}))


def as_manifest(version: int) -> None:
    decode_manifest(json.dumps({**UNLIKE_OURS, "v": version}), "/out")


def as_shard(version: int) -> None:
    footer = json.dumps({**UNLIKE_OURS, "v": version})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({"embedstream": footer}), sink)
    read_footer(pa.BufferReader(sink.getvalue()), "/out/part-x.parquet")


@pytest.mark.parametrize(
    ("read", "error", "what", "reader"),
    [
        (as_block, BlockError, "block", "this worker"),
        (as_spec, UsageError, "job spec", "this embedstream"),
        (as_manifest, OutputError, "/out: the manifest", "this embedstream"),
        (as_shard, OutputError, "/out/part-x.parquet: the shard", "this embedstream"),
    ],
)
def test_data_of_another_version_say_which_side_to_upgrade(
    read: object, error: type[EmbedstreamError], what: str, reader: str
) -> None:
    assert callable(read)
    for version, side in ((NEWER, "it"), (OLDER, "the side that wrote that")):
        with pytest.raises(error) as refused:
            read(version)
        assert str(refused.value) == (
            f"{what} has format version {version}, {reader} reads {FORMAT_VERSION}: upgrade {side}"
        )
        # Of a damaged one people are told to remove it; this one is whole.
        assert not isinstance(refused.value, ManifestDamaged)


def test_a_worker_leaves_a_newer_job_to_others_and_everybody_sees_why(tmp_path: Path) -> None:
    lab = Lab(fakeredis.FakeRedis(server=fakeredis.FakeServer()))
    newer, ours = lab.create(str(tmp_path / "newer")), lab.create(str(tmp_path / "ours"))
    lab.client.hset(lab.keys.job(newer), "spec", json.dumps({**UNLIKE_OURS, "v": NEWER}))
    worker = Jobs(lab.broker, "redis://x", HashingEngine(), EngineOptions("m"), (str(tmp_path),), lambda *_: 0)
    assert [job.id for job in worker.takeable()] == [ours]
    why = f"job spec has format version {NEWER}, this embedstream reads {FORMAT_VERSION}: upgrade it"
    assert worker.refused_for_good() == {newer: why}
    assert look_at_queue(lab.broker).unreadable == {newer: why}
    assert lab.broker.state(newer) == "submitting"  # it is not failed: who can serve it, still may
