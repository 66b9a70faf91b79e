"""Which models are live is looked up once for all that ask meanwhile."""

from __future__ import annotations

import asyncio

import pytest
from gateway.test_gathering import WORKER

from embedstream.api.async_client import AsyncClient
from embedstream.errors import BrokerError
from embedstream.queue.workers import WorkerRecord
from embedstream_gateway.fleet import Fleet
from embedstream_gateway.refusals import Refusal


class Answering(AsyncClient):
    """Has these workers."""

    def __init__(self, **workers: list[WorkerRecord]) -> None:
        self._workers = workers

    async def workers(self) -> dict[str, list[WorkerRecord]]:
        return self._workers


async def test_a_model_is_unknown_only_where_others_are_known() -> None:
    for emptied_a_moment_ago in (Answering(), Answering(other=[])):
        with pytest.raises(Refusal) as empty:
            await Fleet(emptied_a_moment_ago).find("m")
        assert (empty.value.status, bool(empty.value.retry_after)) == (503, True)
    with pytest.raises(Refusal) as unknown:
        await Fleet(Answering(other=[WORKER])).find("n")
    assert unknown.value.status == 404
    assert (await Fleet(Answering(other=[WORKER])).find("other")).queue == "other"


class Hanging(AsyncClient):
    """Says nothing until it fails."""

    def __init__(self) -> None:
        self.looks = 0
        self.over = asyncio.Event()

    async def workers(self) -> dict[str, list[WorkerRecord]]:
        self.looks += 1
        await self.over.wait()
        raise BrokerError("Redis hangs")


async def test_requests_that_wait_for_a_redis_that_hangs_fail_together_and_not_one_by_one() -> None:
    client = Hanging()
    fleet = Fleet(client)
    asked = [asyncio.create_task(fleet.find("m")) for _ in range(20)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    client.over.set()
    first, *others = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert all(isinstance(each, BrokerError) for each in others)
    assert client.looks == 1
