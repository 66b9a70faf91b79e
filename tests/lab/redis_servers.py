"""Redis servers of one test's own: killed, started again with their data or without, told to refuse."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from embedstream.server.connection import connect
from embedstream_producer.embedded.programs import find_program


class OwnServer:
    """A server with an append-only file, on a socket and on a port of this machine."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/redis.sock"
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, wait: bool = True, *options: str) -> None:
        """Start it on the data that lies in its folder."""
        where = ["--dir", str(self.folder), "--port", str(self.port), "--unixsocket", f"{self.folder}/redis.sock"]
        command = [*find_program().command, *where, "--save", "", "--appendonly", "yes", *self._options, *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if wait:
            end = time.monotonic() + 30
            while not self._answers():
                assert self._process.poll() is None, "the server does not start"
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with connect(self.url, 0) as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        """Its data stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def lose_data(self) -> None:
        """Remove what a killed server had on disk."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def client(self, url: str | None = None) -> Any:
        """redis-py types its replies as unions over all its configurations; ours are bytes."""
        return connect(url or self.url, 0)


@contextlib.contextmanager
def own_server(*options: str) -> Iterator[OwnServer]:
    """A server in a short folder, as socket paths end at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="es-", dir="/tmp") as folder:
        made = OwnServer(Path(folder), *options)
        try:
            yield made
        finally:
            made.kill()


def free_port() -> int:
    """A port that is free now, as is the one 10,000 above it, which a node of a cluster takes, too."""
    while True:
        with socket.socket() as listener, socket.socket() as second:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 10_000))
                return port
