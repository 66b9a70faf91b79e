"""Notes of chunks that may be poison, while Redis is away."""

from __future__ import annotations

import threading
from typing import TypeVar

import pytest
from lab.redis_servers import own_server
from lab.worker import pack

from e2e.harness import wait_until
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Step
from embedstream.records import Recipe
from embedstream.server.connection import connect
from embedstream_worker import suspects
from embedstream_worker.held import Held, HeldBlock
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Life

T = TypeVar("T")

RECIPE = Recipe(model="m", fingerprint="f", engine="hashing", dtype="float32", normalized=False, max_length=512)


class CountingBroker(Broker):
    """Counts the steps that it was asked to run."""

    tries = 0

    def run(self, step: Step[T]) -> T:
        self.tries += 1
        return super().run(step)


def test_an_outage_during_a_trial_is_told_once_and_the_note_is_made_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with own_server() as server:
        broker = CountingBroker(connect(server.url, retries=0), "hashing")
        spec = JobSpec(queue="hashing", output="/data/out", model="hashing", parts=("records",))
        broker.run(broker.create(spec))
        (block,) = pack(["one", "two"], 8)
        broker.run(broker.submit(spec.job, encode_block(block), 1 << 20))
        held, stream = Held(), broker.keys.blocks(spec.job)
        held.add(stream, "1-1")
        sink = open_sink(spec.output, spec, server.url)
        job = OpenJob(
            id=spec.job,
            spec=spec,
            prompt="",
            prompt_length=0,
            max_length=8,
            space="",
            outputs=(),
            sink=sink,
            recipe=RECIPE,
        )
        trial = suspects.Trial(broker, held, Life(), HeldBlock(job, stream, "1-1", 0, suspects.BY_CHUNK, block, 0))
        server.kill()
        broker.tries = 0
        noting = threading.Thread(target=trial.note, args=(1,), daemon=True)
        noting.start()
        wait_until(lambda: broker.tries > 3, "several tries")
        server.start()
        noting.join(30)
        assert not noting.is_alive()
        assert broker.suspected(spec.job, 0, 0) == (1,)
    said = [record.getMessage() for record in caplog.records if "may be poison" in record.getMessage()]
    assert len(said) == 2, said
    assert "trying again" in said[0]
    assert "can be used again" in said[1]
