"""Real processes, broken at each point where state changes; whoever comes next makes the job whole."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from conftest import RedisServer

from crash.stage import Zygote, stage, write_corpus, write_older
from crash.walks import Walk, walks
from embedstream.failpoints import POINTS, SCRIPTS
from embedstream.queue import scripts

AT_ONCE = 10
"""Most of a walk is waiting for leases."""

WALKS = walks()

Outcomes = dict[Walk, concurrent.futures.Future[None]]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcomes]:
    """All walks that were asked for, begun at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen: list[Walk] = [cast(Walk, item.callspec.params["walk"]) for item in items if "outcomes" in item.fixturenames]
    folder = tmp_path_factory.mktemp("walks")
    corpus = write_corpus(folder)
    client = redis_server.client()
    for step in SCRIPTS:
        client.script_load(scripts.load(step).body)
    zygote = Zygote()

    older = write_older(zygote, folder, corpus) if any(walk.updates for walk in chosen) else None

    def walk(walk: Walk, folder: Path) -> None:
        folder.mkdir()
        updated = older if walk.updates else None
        with stage(zygote, redis_server.url, folder, corpus, walk.to_redis, walk.int8, updated) as made:
            walk.story(made, walk.order)
            made.judge()

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        yield {each: pool.submit(walk, each, folder / str(n)) for n, each in enumerate(chosen)}
        pool.shutdown(cancel_futures=True)
    zygote.close()


@pytest.mark.holds("Complete", "Durable before acknowledged")
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_each_row_comes_out_once_whoever_breaks(walk: Walk, outcomes: Outcomes) -> None:
    outcomes[walk].result()


def test_every_point_is_walked() -> None:
    assert {walk.order.point for walk in WALKS} == POINTS
