"""What a private server leaves in the state folder for the run after it, and how that run takes over.

`server.json` says which program writes the append-only file and which processes belong to the run; `server.lock` is
held by the server itself as long as it lives, so two servers never share a folder whatever `server.json` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import msgspec
import redis

from embedstream.errors import ServerError
from embedstream.server.connection import connect
from embedstream_producer.embedded.private import PrivateFolder, is_own_folder
from embedstream_producer.embedded.processes import Process, end, is_running, wait_ended
from embedstream_producer.embedded.programs import Program

RECORD = "server.json"
CLAIM = "server.lock"
LOG = "server.log"
WORKER_LOG = "worker.log"
DATA = "appendonly"
ASIDE = ".aside-"

SOCKET = "redis.sock"
SOCKET_FOLDER = "embedstream-"
"""Beginning of the name of the temporary folder that holds a socket."""

MADE = (RECORD, CLAIM, LOG, WORKER_LOG, DATA, "temp-")
"""Beginnings of all names in a state folder but the lock's: ours, the server's data, its files before a rename."""

CHILD_GRACE_SECONDS = 15.0
"""A worker that is asked to leave finishes its batch, commits, and hands the rest back."""

SHUTDOWN_SECONDS = 30.0
"""A clean stop writes the append-only file out: seconds on a slow disk."""

CLAIM_SECONDS = 30.0
"""A killed server's rewriting child may go on for a while."""


Say = Callable[[str], None]
"""How a run tells its user something."""


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`server.json`."""

    program: Program
    """What wrote the files in this folder."""
    socket: str
    """Path of the unix socket; empty for the stand-in and for a server that was stopped."""
    server: Process | None = None
    """None: stopped, or killed before its pid could be noted."""
    children: tuple[Process, ...] = ()
    """Workers of the run."""


def read_record(state: PrivateFolder) -> ServerRecord | None:
    """What the run before left; None if nothing, or nothing that can be read."""
    try:
        return msgspec.json.decode(state.read(RECORD) or b"", type=ServerRecord)
    except msgspec.MsgspecError:
        return None


def write_record(state: PrivateFolder, record: ServerRecord) -> None:
    """Replace `server.json` in one step."""
    with open(f"{RECORD}.new", "wb", opener=state.opener) as file:
        file.write(msgspec.json.format(msgspec.json.encode(record)))
    state.rename(f"{RECORD}.new", RECORD)


def claim_folder(state: PrivateFolder) -> int:
    """The lock that the server will inherit and hold, as an open file.

    Raises:
        ServerError: a server has it, one that could not be ended.
    """
    fd = state.opener(CLAIM, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise ServerError(
                    f"{state.path}: a Redis server of an earlier run still works here and could not be ended "
                    f"(perhaps on another machine): end it and run this again"
                ) from None
            time.sleep(0.05)
        else:
            return fd


def end_survivors(record: ServerRecord) -> bool:
    """End what a killed run left behind: workers first, while they can still commit, then the server.

    A process that merely got the pid of one of them is left alone. Returns whether anything was left.
    """
    children = [child for child in record.children if is_running(child)]
    for child in children:
        end(child, CHILD_GRACE_SECONDS)
    answered = _shut_down(record.socket)
    survived = record.server is not None and is_running(record.server)
    if record.server is not None and not (answered and wait_ended(record.server, SHUTDOWN_SECONDS)):
        end(record.server, SHUTDOWN_SECONDS)
    remove_socket(record.socket)
    return bool(children) or answered or survived


def remove_socket(path: str) -> None:
    """Remove a socket and the folder made for it, and nothing else that may lie there."""
    socket = Path(path)
    if _is_socket_folder(socket):
        with contextlib.suppress(OSError):
            if socket.is_socket():
                socket.unlink()
            socket.parent.rmdir()


def _is_socket_folder(socket: Path) -> bool:
    """Whether the socket, if it is there, lies in a folder that was made for one, and that only this user can enter."""
    named = socket.name == SOCKET and socket.parent.name.startswith(SOCKET_FOLDER)
    return named and not socket.is_symlink() and is_own_folder(socket.parent)


def _shut_down(path: str) -> bool:
    """Ask the server at a socket to write its data out and end; False if none answers.

    The socket lies in a folder that only this user can enter, so who answers there is the server of that run, also
    when the run was killed before it could note the pid.
    """
    if not _is_socket_folder(Path(path)) or not Path(path).is_socket():
        return False
    with connect(f"unix://{quote(path)}", retries=0, timeout=5.0) as client:
        try:
            client.shutdown()
        except redis.RedisError:
            return False
    return True


def put_aside(state: PrivateFolder) -> list[tuple[str, str]]:
    """Rename append-only files so that the next server starts empty; pairs of old and new name."""
    moved, names = [], set(state.names())
    for name in sorted(names):
        if name.startswith(DATA) and ASIDE not in name:
            to = next(new for n in itertools.count(1) if (new := f"{name}{ASIDE}{n}") not in names)
            state.rename(name, to)
            moved.append((name, to))
    return moved


def put_back(state: PrivateFolder, moved: list[tuple[str, str]]) -> None:
    """Undo `put_aside`, dropping what a server that did not start has made since."""
    for name, aside in moved:
        state.remove(name)
        state.rename(aside, name)


def make_readable(state: PrivateFolder, before: ServerRecord | None, program: Program, say: Say) -> None:
    """Put files aside that `program` may not read, or may take for none."""
    if before is not None and program.reads_files_of(before.program):
        return
    moved = put_aside(state)
    if moved:
        writer = f"{before.program.product} {before.program.version}" if before else "an unknown version"
        say(
            f"{state.path / moved[0][0]}: written by {writer}, which {program.product} {program.version} may not read: "
            f"put aside as {moved[0][1]}; what lies in the output is kept, the rest is submitted again"
        )
