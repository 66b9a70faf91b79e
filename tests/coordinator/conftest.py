"""One server for the coordinator's own tests, empty at the start of each."""

from __future__ import annotations

import pytest
from conftest import RedisServer


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    redis_server.client().flushall()
    return redis_server.url
