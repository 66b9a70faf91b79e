"""Small requests beside a job's batches: they wait for none of these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from e2e.harness import wait_until
from lab.worker import share

from embedstream_worker.ahead import Ahead
from embedstream_worker.engines.base import Engine, Results
from embedstream_worker.express import MOST_TOKENS, Express
from embedstream_worker.held import EmbeddedGroup, TokenizedGroup
from embedstream_worker.infer import Infer, Urgent
from embedstream_worker.pipeline import Channel, start_stage

from .test_infer import FakeEngine, make_group, make_tokens

BULK = 7
"""Rows of the job, whose first tokens are 0 to 6; a request's is always 0, and it has more tokens."""


class Twofold(FakeEngine):
    """Can be had once more."""

    def __init__(self, before: Callable[[list[int]], None], refuses: bool = False) -> None:
        super().__init__(before)
        self.refuses = refuses
        self.twins: list[FakeEngine] = []

    def twin(self) -> Engine:
        if self.refuses:
            raise MemoryError("no room for two")
        self.twins.append(FakeEngine())
        return self.twins[-1]


@contextmanager
def serving(make: Callable[[Callable[[list[int]], None]], FakeEngine]) -> Iterator[tuple[Express, threading.Event]]:
    """The way of requests, while a job's first batch is held in the model until the event is set."""
    arrived, go_on = threading.Event(), threading.Event()

    def before(_: list[int]) -> None:
        arrived.set()
        assert go_on.wait(30)

    engine, shared = make(before), share()
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    out: Channel[list[EmbeddedGroup]] = Channel(1)
    infer = Infer(shared, engine, 64, Ahead(64, padded=False), source, out)
    express = Express(shared, engine, infer, source)
    stage = start_stage("infer", shared.life, infer.run, [source, out])
    source.put([make_group([3] * BULK)])
    assert arrived.wait(30)
    wait_until(lambda: infer.busy, "the stage to know of its batch")
    try:
        yield express, go_on
    finally:
        go_on.set()
        source.close()
        stage.join(30)
        express.close(30)
        assert shared.life.failure is None


def request(tokens: int = 5) -> Urgent:
    return Urgent(make_tokens([tokens]), 0, "query")


def test_a_request_is_answered_while_a_batch_is_in_the_model() -> None:
    with serving(Twofold) as (express, go_on):
        urgent = request()
        express.put_first(urgent)
        assert urgent.done.wait(30)
        assert not go_on.is_set()
        assert urgent.results is not None
        np.testing.assert_array_equal(urgent.results["dense"], [[0, 5]])


def test_a_model_is_loaded_once_more_for_all_requests_together() -> None:
    engines: list[Twofold] = []

    def make(before: Callable[[list[int]], None]) -> FakeEngine:
        engines.append(Twofold(before))
        return engines[-1]

    with serving(make) as (express, _):
        for _ in range(3):
            urgent = request()
            express.put_first(urgent)
            assert urgent.done.wait(30)
        assert len(engines[0].twins) == 1
        assert len(engines[0].twins[0].calls) == 3


def test_a_model_that_is_idle_is_not_loaded_once_more() -> None:
    engine, shared = Twofold(lambda _: None), share()
    source: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
    infer = Infer(shared, engine, 64, Ahead(64, padded=False), source, Channel[list[EmbeddedGroup]](1))
    stage = start_stage("infer", shared.life, infer.run, [source])
    urgent = request()
    Express(shared, engine, infer, source).put_first(urgent)
    assert urgent.done.wait(30)
    assert (len(engine.calls), engine.twins) == (1, [])
    source.close()
    stage.join(30)


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (FakeEngine, 5),
        (Twofold, MOST_TOKENS + 1),
        (lambda before: Twofold(before, refuses=True), 5),
    ],
    ids=["an engine that is there once", "a long request", "no memory"],
)
def test_other_requests_go_before_the_next_batch(
    make: Callable[[Callable[[list[int]], None]], FakeEngine], tokens: int
) -> None:
    with serving(make) as (express, go_on):
        urgent = request(tokens)
        express.put_first(urgent)
        assert not urgent.done.wait(0.05)
        go_on.set()
        assert urgent.done.wait(30)
        assert urgent.results is not None
        np.testing.assert_array_equal(urgent.results["dense"], [[0, tokens]])


class Asked(Twofold):
    """Embeds queries in a way of its own, as its twin does not."""

    def query(self, text: str, prompt: str | None) -> Results:  # noqa: ARG002
        return {"dense": np.array([[len(text), 0]], np.float32)}


def test_queries_of_an_engines_own_way_wait_for_the_batch_in_it() -> None:
    engines: list[Asked] = []

    def make(before: Callable[[list[int]], None]) -> Asked:
        engines.append(Asked(before))
        return engines[0]

    with serving(make) as (express, go_on):
        urgent = Urgent(make_tokens([]), 0, "query", queries=("four",))
        express.put_first(urgent)
        go_on.set()
        assert urgent.done.wait(30)
        assert urgent.results is not None
        np.testing.assert_array_equal(urgent.results["dense"], [[4, 0]])
        assert not engines[0].twins
