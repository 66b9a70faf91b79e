"""A fleet on this machine: a Redis server as the README starts one, worker processes, `embed-submit`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream_producer.embedded.programs import find_program

BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Without any EMBEDSTREAM_* of the person who measures."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EMBEDSTREAM_")}


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    product: str


@contextlib.contextmanager
def serve_redis() -> Iterator[Server]:
    """A server with an append-only file, in a temporary folder (socket paths end at 107 bytes, so a short one)."""
    program = find_program()
    with tempfile.TemporaryDirectory(prefix="es-bench-") as folder:
        socket = Path(folder) / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", "", "--appendonly", "yes"]
        process = subprocess.Popen([*program.command, *options], stdout=subprocess.DEVNULL)
        try:
            while not socket.exists():
                if process.poll() is not None:
                    raise SystemExit("redis-server does not start")
                time.sleep(0.01)
            connect(f"unix://{socket}").ping()  # a socket is there a moment before the server listens on it
            yield Server(f"unix://{socket}", process.pid, f"{program.product} {program.version}")
        finally:
            process.kill()
            process.wait()


class Worker:
    """One embed-worker process, ready when this returns. Its log lies beside its outputs.

    `variables`: EMBEDSTREAM_* that it is to find in its environment.
    """

    def __init__(self, server: Server, root: Path, model: str, queue: str, *options: str, **variables: str) -> None:
        self.queue = queue
        self.log = root / f"worker-{queue}-{len(list(root.glob('worker-*.log')))}.log"
        command = [str(BIN / "embed-worker"), "--model", model, "--redis", server.url, "--queue", queue]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--output-root", str(root), *options], env={**environment(), **variables}, stderr=log
            )
        broker = Broker(connect(server.url), queue)
        while not any(w.pid == self.pid and w.state == "ready" for w in broker.workers()):
            if self._process.poll() is not None:
                raise SystemExit(f"the worker ended:\n{self.log.read_text()}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def submit(server: Server, corpus: Path, output: Path, model: str, queue: str, *options: str) -> dict[str, Any]:
    """One job to its end; what `embed-submit --json` reports."""
    command = [str(BIN / "embed-submit"), str(corpus), "-o", str(output), "--redis", server.url, "--queue", queue]
    done = subprocess.run(
        [*command, "--model", model, "--json", "--quiet", *options],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"embed-submit ended with {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
