"""Which models are live is looked up once for all that ask meanwhile."""

from __future__ import annotations

import asyncio

from embedstream.api.async_client import AsyncClient
from embedstream.errors import BrokerError
from embedstream.queue.workers import WorkerRecord
from embedstream_gateway.fleet import Fleet


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
