"""The private server's own life."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import msgspec
import redis

from embedstream.cli.starting import environment
from embedstream.errors import ServerError
from embedstream.machine import memory_bytes
from embedstream.masking import mask
from embedstream.server.connection import connect
from embedstream.temporary import temporary_folder
from embedstream.terminal import is_utf8
from embedstream_producer.embedded.lock import OutputLock
from embedstream_producer.embedded.private import PrivateFolder
from embedstream_producer.embedded.processes import identify, is_running
from embedstream_producer.embedded.programs import Program, find_program
from embedstream_producer.embedded.state import (
    LOG,
    SHUTDOWN_SECONDS,
    SOCKET,
    SOCKET_FOLDER,
    Say,
    ServerRecord,
    claim_folder,
    end_survivors,
    make_readable,
    put_aside,
    put_back,
    read_record,
    remove_socket,
    write_record,
)

LONGEST_SOCKET_PATH = 103
"""Bytes: 107 on Linux, 103 on macOS."""

START_SECONDS = 30.0
"""From the start of the process to its first answer; loading its data may then take as long as it takes."""


def _print(message: str) -> None:
    print(message, file=sys.stderr)


class PrivateServer:
    """A running server that only this user can reach. Made by `start`; a context manager that stops it."""

    url: str
    """Where clients find it: `unix://…`, or a port of this machine alone for the stand-in."""
    program: Program

    @classmethod
    def start(cls, lock: OutputLock, *, program: Program | None = None, say: Say = _print) -> PrivateServer:
        """Start a server on the state folder of a locked output, with the data of the run before.

        What a killed run left running is ended first. Append-only files that cannot be read are put aside, with a
        word through `say`. `program` is the best one of this machine unless given.

        Raises:
            ServerError: no server could be found or started; the message ends with its last log lines.
        """
        if not lock.held:
            raise ServerError(f"{mask(lock.output)}: lock the output before a server is started on it")
        before = read_record(lock.state)
        if before is not None and end_survivors(before):
            say(f"{mask(lock.output)}: ended what an earlier run left running")
        server = cls(lock.state, program or find_program(), before, say)
        try:
            server._start()
        except OSError as error:
            server.stop()
            raise ServerError(f"{lock.state.path}: no server could be started here: {error}") from error
        except BaseException:
            server.stop()
            raise
        if not server.program.keeps_data:
            say(
                "no redis-server or valkey-server here: using a stand-in that keeps nothing on disk, so that an "
                "interrupted run finds only the vectors already written, and that any user of this machine can reach"
            )
        return server

    def __init__(self, state: PrivateFolder, program: Program, before: ServerRecord | None, say: Say) -> None:
        self.program = program
        self._state = state
        self._before = before
        self._say = say
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._record = ServerRecord(program=program, socket="")
        self._recording = threading.Lock()

    def alive(self) -> bool:
        """Whether the server process still runs."""
        return self._process is not None and self._process.poll() is None

    def record_child(self, pid: int) -> None:
        """Note a process that must not outlive this run: the next one ends it if this one cannot."""
        child = identify(pid)
        with self._recording:
            children = [old for old in self._record.children if is_running(old)]
            if child is not None and child not in children:
                children.append(child)
            self._note(children=tuple(children))

    def stop(self) -> None:
        """Stop the server, its data written out. Twice is harmless; a forked child's call does nothing."""
        if os.getpid() != self._owner:
            return
        if self._process is not None:
            self._end_process(self._process)
            self._process = None
        remove_socket(self._record.socket)
        with self._recording:
            if self._state.path.is_dir() and self._record.server is not None:
                self._note(server=None, socket="")
        atexit.unregister(self.stop)

    def __enter__(self) -> PrivateServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _note(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        write_record(self._state, self._record)

    def _start(self) -> None:
        claim = claim_folder(self._state)
        try:
            make_readable(self._state, self._before, self.program, self._say)
            self._launch(claim)
            code = self._wait_ready()
            if code is not None:
                self._start_empty(claim, code)
        finally:
            os.close(claim)  # the server has its own

    def _start_empty(self, claim: int, code: int) -> None:
        """Try without the old data, in case that was what the server could not bear."""
        reason = self._log_tail()
        moved = [] if code in (-signal.SIGKILL, -signal.SIGTERM) else put_aside(self._state)
        if moved:
            remove_socket(self._record.socket)
            self._launch(claim)
            if self._wait_ready() is None:
                self._say(
                    f"{self._state.path / moved[0][0]}: cannot be read, put aside as {moved[0][1]}; what lies in "
                    f"the output is kept, the rest is submitted again. The server said:\n{reason}"
                )
                return
            put_back(self._state, moved)
        raise ServerError(f"{self._describe()} ended at once (exit status {code}):\n{reason}")

    def _launch(self, claim: int) -> None:
        atexit.register(self.stop)
        with open(LOG, "wb", opener=self._state.opener) as log:
            if self.program.keeps_data:
                self._launch_real(claim, log.fileno())
            else:
                self._launch_fake(claim, log.fileno())
        with self._recording:
            self._note(server=identify(self._process.pid) if self._process else None)

    def _launch_real(self, claim: int, log: int) -> None:
        path = _short_folder() / SOCKET
        self.url = f"unix://{quote(str(path))}"
        with self._recording:
            self._note(socket=str(path))  # before it runs, so that it can be found if we are killed right after
        options = {
            "port": "0",
            "unixsocket": str(path),
            "unixsocketperm": "700",
            "dir": str(self._state.path),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",  # a machine crash cuts the end off; what is missing is submitted again
            "save": "",
            # The other half is the worker's and ours. What may wait here follows from it (`Broker.memory_bound`).
            "maxmemory": str(memory_bytes() // 2),
            "maxmemory-policy": "noeviction",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [*self.program.command, *arguments],
            env=environment(),
            umask=0o077,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(claim,),
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
        )

    def _launch_fake(self, claim: int, log: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
            self._process = subprocess.Popen(
                [*self.program.command, str(listener.fileno())],
                env=environment(),
                stdin=subprocess.PIPE,  # its end tells the stand-in that we are gone
                stdout=log,
                stderr=log,
                pass_fds=(claim, listener.fileno()),
                start_new_session=True,
            )

    def _wait_ready(self) -> int | None:
        """None once the server answers; its exit status if it ended instead."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        with connect(self.url, retries=0, timeout=5.0) as client:
            while True:
                code = self._process.poll()
                if code is not None:
                    return code
                try:
                    client.ping()
                except redis.BusyLoadingError:
                    deadline = time.monotonic() + START_SECONDS
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    if time.monotonic() >= deadline:
                        raise ServerError(f"{self._describe()} does not answer: {error}\n{self._log_tail()}") from error
                else:
                    return None
                time.sleep(0.01)

    def _end_process(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _describe(self) -> str:
        return f"{self.program.product} {self.program.version} ({self.program.command[0]}) on {self._state.path}"

    def _log_tail(self) -> str:
        return "\n".join((self._state.read(LOG) or b"").decode(errors="replace").splitlines()[-8:])


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
