"""Servers for the broker's tests. Every test has a queue of its own, and leaves no key behind that would stay."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest
import redis
from conftest import RedisServer
from lab.broker import Lab


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture(scope="session")
def real_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(params=["redis", "fakeredis"])
def client(request: pytest.FixtureRequest) -> redis.Redis:
    """One server, then the other: every test that takes this runs on both."""
    if request.param == "fakeredis":
        return fakeredis.FakeRedis(server=fakeredis.FakeServer())
    found: redis.Redis = request.getfixturevalue("real_client")
    return found


@pytest.fixture
def lab(client: redis.Redis) -> Iterator[Lab]:
    lab = Lab(client)
    yield lab
    assert lab.left_behind() == []


@pytest.fixture
def real_lab(real_client: redis.Redis) -> Iterator[Lab]:
    """For what only a real server does."""
    lab = Lab(real_client)
    yield lab
    assert lab.left_behind() == []
