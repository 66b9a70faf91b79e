"""What a user reads when Redis is not there, refuses, or is something else."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest
import redis

from embedstream.errors import BrokerError, UsageError
from embedstream.server import connection, preflight

SECRET = "s3cret-pass"


@pytest.fixture
def http_port() -> Iterator[int]:
    """A server that takes whatever it is sent for a bad HTTP request."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def guarded(real_client: redis.Redis, redis_url: str) -> Iterator[str]:
    """The real server asks new connections for a password meanwhile."""
    real_client.config_set("requirepass", SECRET)
    yield redis_url
    real_client.config_set("requirepass", "")


def complaint(url: str) -> str:
    client = connection.connect(url, retries=0)
    with client, pytest.raises(BrokerError) as caught:
        preflight.check(client, url)
    return str(caught.value)


def test_a_server_that_answers_passes(redis_url: str) -> None:
    with connection.connect(redis_url) as client:
        preflight.check(client, redis_url)


async def test_the_asyncio_client_reaches_the_same_server(redis_url: str) -> None:
    async with connection.connect_async(redis_url) as client:
        assert await client.echo("here") == b"here"


def test_nobody_listening(closed_port: int) -> None:
    text = complaint(f"redis://user:{SECRET}@127.0.0.1:{closed_port}/0")
    assert f"redis://user:***@127.0.0.1:{closed_port}/0 cannot be reached" in text
    assert "check the URL and that a Redis server runs there" in text
    assert SECRET not in text


def test_a_socket_that_does_not_exist() -> None:
    assert "cannot be reached" in complaint("unix:///tmp/no-such-dir/redis.sock")


def test_a_host_that_does_not_exist() -> None:
    assert "no-such-host.invalid:6379 cannot be reached" in complaint("redis://no-such-host.invalid:6379")


def test_a_missing_password(guarded: str) -> None:
    assert "refuses the password: put user and password into the URL" in complaint(guarded)


def test_a_wrong_password_is_refused_and_not_shown(guarded: str) -> None:
    text = complaint(guarded.replace("unix://", "unix://:wr0ng-pass@"))
    assert "refuses the password" in text
    assert "wr0ng-pass" not in text
    with connection.connect(guarded.replace("unix://", f"unix://:{SECRET}@")) as client:
        preflight.check(client, guarded)


def test_a_server_that_is_not_redis(http_port: int) -> None:
    text = complaint(f"redis://:{SECRET}@127.0.0.1:{http_port}")
    assert "does not speak the Redis protocol: check host and port" in text
    assert SECRET not in text


def test_tls_to_a_server_without_it(http_port: int) -> None:
    assert "TLS failed" in complaint(f"rediss://127.0.0.1:{http_port}")


@pytest.mark.parametrize(
    "url",
    [
        f"http://u:{SECRET}@h:1",
        "localhost:6379",
        "",
        f"redis://:{SECRET}@host:port/0",
        "redis://h:99999",
        "redis://[::1",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    for connect in (connection.connect, connection.connect_async):
        with pytest.raises(UsageError, match="Redis URL") as caught:
            connect(url)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mark", ["@%s/", "/%s", "?%s", "#%s", "/@%s", "#@%s"])
def test_a_password_with_an_unescaped_mark_is_not_shown(mark: str) -> None:
    url = f"redis://:first{mark % SECRET}@h:6379/0"
    for connect in (connection.connect, connection.connect_async):
        with pytest.raises(UsageError, match="in a password") as caught:
            connect(url)
        assert SECRET not in str(caught.value)
        assert "first" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        (f"redis://:{SECRET}@h:6379/0", "redis://:***@h:6379/0"),
        (f"rediss://me:{SECRET}@h/1?ssl_cert_reqs=none", "rediss://me:***@h/1?ssl_cert_reqs=none"),
        (f"redis://h/0?password={SECRET}&db=1", "redis://h/0?password=***&db=1"),
    ],
)
def test_a_password_is_masked(url: str, shown: str) -> None:
    assert connection.mask(url) == shown


def test_a_command_to_paste_names_redis_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, secret = "unix:///tmp/my redis.sock", f"redis://:{SECRET}@h:6379/0"
    monkeypatch.delenv("EMBEDSTREAM_REDIS_URL", raising=False)
    assert connection.with_redis("embed-status", plain) == "`embed-status --redis 'unix:///tmp/my redis.sock'`"
    referred = "`embed-status` with the same --redis, or with EMBEDSTREAM_REDIS_URL set"
    assert connection.with_redis("embed-status", secret) == referred
    for url in (plain, secret):
        monkeypatch.setenv("EMBEDSTREAM_REDIS_URL", url)
        assert connection.with_redis("embed-status", url) == "`embed-status`"
    assert connection.with_redis("embed-status", plain) == "`embed-status --redis 'unix:///tmp/my redis.sock'`"
