"""What jobs in RQ do where they cannot do their work."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from lab.broker import Lab

from embedstream.errors import InputError
from embedstream.jobs import JobState
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import Compaction, compactions, note_repeated, save_compaction, troubles
from embedstream.server.connection import connect
from embedstream_coordinator import functions
from embedstream_coordinator.context import ELSEWHERE, Context
from embedstream_coordinator.ingesting import ingest_part


@pytest.fixture
def lab(redis_url: str) -> Lab:
    return Lab(connect(redis_url))


def test_a_manifest_below_the_roots_of_other_coordinators_is_left_to_them(lab: Lab, redis_url: str) -> None:
    context = Context(redis_url=redis_url, input_roots=(), output_roots=("/mine",))
    job = lab.create("/others/out")
    lab.broker.run(lab.broker.cancel(job))
    assert functions.finalize(context, lab.broker.queue, job) == ELSEWHERE
    assert (lab.broker.state(job), lab.broker.outbox()) == (JobState.FINALIZING, [job])
    assert lab.broker.run(lab.broker.take_finalize(job, 1000)) is not None, "its lease is free"
    assert troubles(lab.broker, job) == {}


def test_a_compaction_below_the_roots_of_other_coordinators_is_left_to_them(redis_url: str, tmp_path: Path) -> None:
    context = Context(redis_url=redis_url, input_roots=(), output_roots=("/mine",))
    broker, wanted = Broker(connect(redis_url), ""), Compaction(output=str(tmp_path), target_bytes=1, groups=("c0",))
    save_compaction(broker, wanted)
    assert functions.compact(context, wanted.id) == functions.merge(context, wanted.id, "c0") == ELSEWHERE
    assert compactions(broker) == [wanted]


@pytest.mark.parametrize("last", ["", '{"id": 1, "text": "x"}'], ids=["all", "among others"])
def test_doris_1594_empty_parts_are_parts_of_no_rows_unless_all_are_empty(
    lab: Lab, redis_url: str, tmp_path: Path, last: str
) -> None:
    context = Context(redis_url=redis_url, input_roots=(str(tmp_path),), output_roots=())
    paths = [tmp_path / f"{part}.jsonl" for part in range(2)]
    for path, content in zip(paths, ("", last), strict=True):
        path.write_text(content)
    spec = msgspec.structs.replace(lab.spec(), parts=tuple(map(str, paths)))
    lab.broker.run(lab.broker.create(spec))
    note_repeated(lab.broker, spec.job, 1, [])
    assert ingest_part(context, lab.broker, spec.job, 0) == "read"
    if last:
        assert ingest_part(context, lab.broker, spec.job, 1) == "read"
        assert lab.broker.state(spec.job) == JobState.RUNNING
    else:
        with pytest.raises(InputError, match=r"1\.jsonl: has no records, nor has any other part"):
            ingest_part(context, lab.broker, spec.job, 1)
