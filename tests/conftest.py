"""What several folders of tests share. It is loaded where only the tests of engines can run: without Redis' client."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import redis
    from lab.s3 import S3Server

with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    # How long an example takes says how busy the machine is.
    hypothesis.settings.register_profile("embedstream", deadline=None)
    hypothesis.settings.load_profile("embedstream")


@dataclass(frozen=True)
class RedisServer:
    """A real server without persistence, shared by all tests: use prefixes or queues of your own."""

    socket: str

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def client(self) -> redis.Redis:
        """A new client; replies are bytes."""
        import redis

        return redis.Redis.from_url(self.url)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What embedded mode keeps of the tests' outputs does not lie among what it keeps of the user's; and what workers
    keep of models is shared by all processes of a run, and neither read from the user's cache nor left in it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("EMBEDSTREAM_CACHE_DIR", str(shared / "cache"))
        yield


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A command that a test runs in this process changes its environment for that test alone."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_logs(request: pytest.FixtureRequest) -> None:
    """What libraries that other tests have loaded did to loggers and handlers keeps no record from this test."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    logging.root.filters.clear()
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("embedstream") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
            logger.filters.clear()
    plugin: Any = request.config.pluginmanager.get_plugin("logging-plugin")
    handler = plugin.caplog_handler
    handler.setLevel(logging.NOTSET)
    handler.filters.clear()
    if handler not in logging.root.handlers:
        logging.root.addHandler(handler)


@contextlib.contextmanager
def serve_redis() -> Iterator[RedisServer]:
    """A server of one's own, on a socket alone."""
    from lab.redis_servers import own_server

    with own_server("--appendonly", "no", "--port", "0") as server:
        yield RedisServer(f"{server.folder}/redis.sock")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Started on first use: use buckets of your own."""
    from lab.s3 import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Started on first use."""
    with serve_redis() as server:
        yield server
