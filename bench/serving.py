"""`make bench-gateway`: what HTTP costs.

    python bench/serving.py

One text over HTTP against `Client.embed`, and how many requests one core of a gateway carries, both with the hashing
engine; then many clients with one text each against a job of the same texts, with the real model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import corpora
from fleet import BIN, Server, Worker, cpu_seconds, environment, serve_redis, submit
from measure import machine, quantile, table, timed

from embedstream import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "all-MiniLM-L6-v2"
CLIENTS = 64
QUEUE = "bench"


@dataclass(frozen=True)
class Load:
    """What many clients got."""

    seconds: float
    waits: list[float]
    """Of each request."""
    cpu: float
    """Seconds of the gateway."""

    @property
    def rate(self) -> float:
        return len(self.waits) / self.seconds


@contextmanager
def serving(server: Server, root: Path) -> Iterator[tuple[int, int]]:
    """A gateway: its port and its process."""
    log = root / "gateway.log"
    with log.open("wb") as err:
        command = [str(BIN / "embed-serve"), "--redis", server.url, "--port", "0"]
        process = subprocess.Popen(command, env=environment(), stderr=err)
    try:
        while (found := re.search(r"serving http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            if process.poll() is not None:
                raise SystemExit(f"the gateway ended:\n{log.read_text()}")
            time.sleep(0.05)
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait(60)


async def ask(port: int, texts: Sequence[str], waits: list[float]) -> None:
    """One client, one text after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for text in texts:
        body = json.dumps({"model": QUEUE, "input": text, "encoding_format": "base64", "truncate": True}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        begun = time.perf_counter()
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        content = await reader.readexactly(int(length[1]) if length else 0)
        if b" 200 " not in answer[:16]:
            raise SystemExit(f"the gateway answered {content.decode()}")
        waits.append(time.perf_counter() - begun)
    writer.close()


def load(port: int, pid: int, texts: Sequence[str], clients: int) -> Load:
    """So many clients share the texts."""
    waits: list[float] = []

    async def run() -> None:
        await asyncio.gather(*(ask(port, texts[client::clients], waits) for client in range(clients)))

    before = cpu_seconds(pid)
    seconds = timed(partial(asyncio.run, run()))
    return Load(seconds, waits, cpu_seconds(pid) - before)


def hashing(requests: int) -> str:
    texts = [f"a short text, number {number}" for number in range(requests)]
    with serve_redis() as server, tempfile.TemporaryDirectory() as folder:
        worker = Worker(server, Path(folder), "hashing", QUEUE)
        with serving(server, Path(folder)) as (port, pid), Client(server.url, queue=QUEUE) as client:
            load(port, pid, texts[:200], 8)
            direct = [timed(partial(client.embed, text)) for text in texts[:500]]
            one, many = load(port, pid, texts[:500], 1), load(port, pid, texts, CLIENTS)
        worker.stop()
    p50 = [1000 * quantile(each, 0.5) for each in (direct, one.waits, many.waits)]
    p99 = [1000 * quantile(each, 0.99) for each in (direct, one.waits, many.waits)]
    names = ("`Client.embed`", "HTTP, one client", f"HTTP, {CLIENTS} clients")
    rows = [(name, f"{p50[at]:.2f}", f"{p99[at]:.2f}") for at, name in enumerate(names)]
    cost = many.cpu / len(many.waits)
    return (
        f"{table(('one text, hashing engine', 'p50 ms', 'p99 ms'), rows)}\n\nHTTP adds {p50[1] - p50[0]:.2f} ms. "
        f"{CLIENTS} clients: {many.rate:,.0f} requests/s beside all else on this machine; a request costs the gateway "
        f"{1e6 * cost:,.0f} µs of CPU, so one core carries {1 / cost:,.0f} requests/s."
    )


def real(count: int) -> str:
    texts = corpora.docstrings(count)
    with serve_redis() as server, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        worker = Worker(server, root, MODEL, QUEUE)
        with serving(server, root) as (port, pid):
            load(port, pid, texts[:CLIENTS], CLIENTS)
            served = load(port, pid, texts, CLIENTS)
        report = submit(server, corpora.write_corpus(root / "c.jsonl", texts), root / "v", MODEL, QUEUE)
        worker.stop()
    bulk = len(texts) / report["seconds"]
    rows = [
        (f"{CLIENTS} clients, a text each", f"{served.rate:,.0f}", f"{1000 * quantile(served.waits, 0.5):,.0f}"),
        ("a job", f"{bulk:,.0f}", ""),
    ]
    shown = table((f"{len(texts):,} docstrings, {MODEL}", "texts/s", "p50 ms"), rows)
    return f"{shown}\n\n{served.rate / bulk:.2f} of what a job makes of the same texts."


def main() -> None:
    parser = argparse.ArgumentParser(description="What HTTP costs.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--texts", type=int, default=1500)
    arguments = parser.parse_args()
    print(f"{machine()}\n\n{hashing(arguments.requests)}\n\n{real(arguments.texts)}")


if __name__ == "__main__":
    main()
