"""One server for all end-to-end tests, and what several files of them share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.worker import WorkerLab, worker_lab

if TYPE_CHECKING:
    from conftest import RedisServer


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Empty at the start of each test."""
    redis_server.client().flushall()
    return redis_server.url


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made
