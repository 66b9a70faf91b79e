"""The private server's own life."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis

from embedstream.cli.starting import environment
from embedstream.errors import ServerError
from embedstream.machine import memory_bytes
from embedstream.masking import mask
from embedstream.server.connection import connect
from embedstream.temporary import temporary_folder
from embedstream.terminal import is_utf8
from embedstream_producer.embedded.group import Group
from embedstream_producer.embedded.lock import SERVER_LOG, OutputLock
from embedstream_producer.embedded.programs import FAKE, Program, find_program

SOCKET = "redis.sock"
SOCKET_FOLDER = "embedstream-"
"""Beginning of the name of the temporary folder that holds a socket."""

LONGEST_SOCKET_PATH = 103
"""Bytes: 107 on Linux, 103 on macOS."""

START_SECONDS = 30.0
"""From the start of the process to its first answer."""

Say = Callable[[str], None]
"""How a run tells its user something."""


def _print(message: str) -> None:
    print(message, file=sys.stderr)


class PrivateServer:
    """A running server that only this user can reach, and that keeps nothing on disk: what counts lies in the output.

    Made by `start`; a context manager that stops it.
    """

    url: str
    """Where clients find it: `unix://…`, or a port of this machine alone for the stand-in."""
    group: Group
    """The server, and the processes that are to end with it."""

    @classmethod
    def start(cls, lock: OutputLock, *, program: Program | None = None, say: Say = _print) -> PrivateServer:
        """Start an empty server for a locked output. `program` is the best one of this machine unless given.

        Raises:
            ServerError: no server could be found or started; the message ends with its last log lines.
        """
        if not lock.held:
            raise ServerError(f"{mask(lock.output)}: lock the output before a server is started on it")
        program = program or find_program()
        try:
            group = Group(lock.claim, _short_folder())
        except OSError as error:
            raise ServerError(f"{mask(lock.output)}: no server could be started: {error}") from error
        try:
            server = cls(lock, program, group)
        except OSError as error:
            group.close()
            raise ServerError(f"{mask(lock.output)}: no server could be started: {error}") from error
        except BaseException:
            group.close()
            raise
        if program.product == FAKE:
            say(
                "no redis-server or valkey-server here: using a stand-in that is slower, and that any user of this "
                "machine can reach"
            )
        return server

    def __init__(self, lock: OutputLock, program: Program, group: Group) -> None:
        self.group = group
        self._state = lock.state
        with open(SERVER_LOG, "wb", opener=self._state.opener) as log:
            if program.product == FAKE:
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    self.url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
                    command, fds = [*program.command, str(listener.fileno())], [listener.fileno()]
                    self._process = group.start(command, log, environment(), fds=fds)
            else:
                path = group.folder / SOCKET
                self.url = f"unix://{quote(str(path))}"
                self._process = group.start([*program.command, *_options(path)], log, environment())
        self._wait_ready(f"{program.product} {program.version} ({program.command[0]})")

    def check(self) -> None:
        """Raise `ServerError` if the server process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"the private Redis server ended (exit status {code}):\n{self._log_tail()}")

    def stop(self) -> None:
        """End all processes of the group. Twice is harmless."""
        self.group.close()
        self._process.wait()

    def __enter__(self) -> PrivateServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_ready(self, named: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        with connect(self.url, retries=0, timeout=5.0) as client:
            while True:
                self.check()
                try:
                    client.ping()
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    if time.monotonic() >= deadline:
                        raise ServerError(f"{named} does not answer: {error}\n{self._log_tail()}") from error
                else:
                    return
                time.sleep(0.01)

    def _log_tail(self) -> str:
        return "\n".join((self._state.read(SERVER_LOG) or b"").decode(errors="replace").splitlines()[-8:])


def _options(path: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(path.parent),
        "daemonize": "no",
        "appendonly": "no",
        "save": "",
        # The other half is the worker's and ours. What may wait here follows from it (`Broker.memory_bound`).
        "maxmemory": str(memory_bytes() // 2),
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _short_folder() -> Path:
    """A new private folder whose path leaves room for a socket's name.

    The user's own choice comes first. `/run/user/…` comes last: it is emptied at log-out, under the feet of a job that
    goes on.
    """
    tried = dict.fromkeys([temporary_folder(), "/tmp", os.environ.get("XDG_RUNTIME_DIR", "")])
    for base in filter(is_utf8, tried):
        if len(os.fsencode(base)) + len(f"/{SOCKET_FOLDER}12345678/{SOCKET}") > LONGEST_SOCKET_PATH or not base:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=SOCKET_FOLDER, dir=base))
        except OSError:
            continue
    raise ServerError(
        f"no folder for a socket: none of {', '.join(filter(None, tried))} can be written and has a path of at most "
        f"{LONGEST_SOCKET_PATH - 33} bytes in UTF-8: set TMPDIR to one that has"
    )
