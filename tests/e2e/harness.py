"""Real processes for the end-to-end tests: workers, producers, and a reader that trusts none of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from lab.forked import Forked, run_forked
from lab.hashing_reference import reference_vector

from embedstream.queue.broker import Broker
from embedstream.queue.coordination import coordinators
from embedstream.server.connection import connect
from embedstream_producer.embedded import state_folder

MODEL = "hashing"
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    """The tests' environment without any EMBEDSTREAM_* of the person who runs them; the cache is the tests' own."""
    own = "EMBEDSTREAM_CACHE_DIR"
    kept = {name: value for name, value in os.environ.items() if name == own or not name.startswith("EMBEDSTREAM_")}
    return {**kept, **extra}


def write_corpus(path: Path, rows: int, seed: int = 0, length: int = 60) -> dict[str, str]:
    """A corpus of `rows` texts of uneven length; returns text by id."""
    rng = random.Random(seed)
    words = [f"w{rng.randrange(10**6)}" for _ in range(2000)]
    texts = {f"{path.stem}-{i}": " ".join(rng.choices(words, k=rng.randint(1, length))) for i in range(rows)}
    with path.open("w", encoding="utf-8") as file:
        for id, text in texts.items():
            file.write(json.dumps({"id": id, "text": text}) + "\n")
    return texts


def start_submit(*args: object, **env: str) -> subprocess.Popen[str]:
    """embed-submit in the background."""
    return subprocess.Popen(
        [str(BIN / "embed-submit"), *map(str, args)],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: str, *args: object, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """One of the commands, to its end."""
    return run_forked([str(BIN / command), *map(str, args)], environment(**env), timeout)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll a condition; its true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


Process = Forked | subprocess.Popen[bytes]


class Fleet:
    """Workers on one Redis, all killed at the end."""

    def __init__(self, redis_url: str, root: Path, forked: bool = True) -> None:
        """`forked`: processes are forks of one that has loaded them; else each is loaded anew, as a user's are."""
        self.url = redis_url
        self.root = root
        self.forked = forked
        self.broker = Broker(connect(redis_url), MODEL)
        self.processes: list[Process] = []

    def start_worker(self, *args: object, wait: bool = True, **env: str) -> Process:
        """A worker of the hashing engine; returns once it is ready."""
        command = [str(BIN / "embed-worker"), "--model", MODEL, "--redis", self.url, "--lease-seconds", "2"]
        roots = ["--output-root", str(self.root), "--output-root", "redis:"]
        process, log = self._start([*command, *roots, *map(str, args)], "worker", env)
        if wait:
            wait_until(lambda: self.is_ready(process), f"worker ready ({log})")
        return process

    def is_ready(self, process: Process) -> bool:
        assert process.poll() is None, f"the worker left with {process.returncode}"
        return any(w.pid == process.pid and w.state == "ready" for w in self.broker.workers())

    def start_coordinator(self, *args: object, **env: str) -> Process:
        """A coordinator; returns once it is there."""
        roots = ["--input-root", str(self.root), "--output-root", str(self.root), "--output-root", "redis:"]
        command = [str(BIN / "embed-coordinator"), "--redis", self.url, *roots, *map(str, args)]
        process, log = self._start(command, "coordinator", env)

        def is_there() -> bool:
            assert process.poll() is None, f"the coordinator left with {process.returncode}"
            return any(c.pid == process.pid for c in coordinators(self.broker))

        wait_until(is_there, f"coordinator ready ({log})")
        return process

    def start_gateway(self, *args: object, **env: str) -> tuple[Process, str]:
        """A gateway on a free port, and its address; returns once it listens."""
        command = [str(BIN / "embed-serve"), "--redis", self.url, "--port", "0", *map(str, args)]
        process, log = self._start(command, "gateway", env)

        def address() -> str | None:
            assert process.poll() is None, f"the gateway left with {process.returncode}: {log.read_text()}"
            found = re.search(r"serving (https?://\S+)", log.read_text() if log.exists() else "")
            return found and found[1]

        return process, wait_until(address, f"gateway ready ({log})")

    def _start(self, command: list[str], kind: str, env: dict[str, str]) -> tuple[Process, Path]:
        """The process, and where its standard error goes."""
        log = self.root / f"{kind}-{len(self.processes)}.log"
        process: Process
        if self.forked:
            process = Forked(command, environment(**env), log)
        else:
            with log.open("wb") as err:
                process = subprocess.Popen(command, env=environment(**env), stderr=err)
        self.processes.append(process)
        return process, log

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def fleet(redis_url: str, root: Path, forked: bool = True) -> Iterator[Fleet]:
    """A fleet for one test."""
    made = Fleet(redis_url, root, forked)
    try:
        yield made
    finally:
        made.close()


def kill_with_children(process: Process) -> None:
    """So that none of them goes on with what it was at."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children)


def read_manifest(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "_manifest.json").read_text())
    return manifest


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Every row of the shards that the manifest lists, by a reader of its own; embeddings as NumPy arrays, [dim]."""
    rows: list[dict[str, Any]] = []
    for shard in read_manifest(output)["shards"]:
        table = pq.read_table(output / shard["file"])
        vectors: Any = table.column("embedding").combine_chunks()
        matrix = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
        others = table.drop_columns(["embedding"]).to_pylist()
        rows += [{**row, "embedding": vector} for row, vector in zip(others, matrix, strict=True)]
    return rows


def read_errors(output: Path) -> list[dict[str, Any]]:
    path = output / "_errors.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def assert_contents(output: Path, *corpus: Path) -> None:
    """The manifest names the corpus's files with their sizes and sums."""
    found = [(part["name"], part["bytes"], part["sha256"]) for part in read_manifest(output)["parts"]]
    files = [(path, path.read_bytes()) for path in corpus]
    assert found == [(str(path), len(data), hashlib.sha256(data).hexdigest()) for path, data in files]


def assert_exact(output: Path, texts: dict[str, str], every: int = 1) -> None:
    """Each id exactly once, with its own text; every n-th vector recomputed from the text."""
    rows = read_rows(output)
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)), "some rows are doubled"
    assert set(ids) == set(texts), "ids in and ids out differ"
    for row in rows:
        assert row["text"] == texts[row["id"]]
    some = {row["id"]: row["embedding"] for row in rows[::every]}
    assert_vectors(some, {id: reference_vector(texts[id]) for id in some})
    assert read_manifest(output)["rows"] == len(rows)


def assert_vectors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Vectors [dim] by id are the expected ones, within the precision of float32."""
    if not found:
        return
    far = ~np.isclose(np.stack([*found.values()]), np.stack([expected[id] for id in found]), rtol=1e-7, atol=1e-6)
    wrong = [id for id, bad in zip(found, far.any(axis=1), strict=True) if bad]
    assert not wrong, f"{len(wrong)} of {len(found)} rows have another vector: {wrong[:10]}"


def assert_no_leftovers(output: Path) -> None:
    """Nothing half-written is left in an output, and no server state of it."""
    names = sorted(path.name for path in output.iterdir()) if output.exists() else []
    assert not [name for name in names if ".tmp-" in name], names
    assert not state_folder(str(output)).exists()


def processes_mentioning(text: str) -> list[str]:
    """Command lines and environments of living processes that contain `text`, but for those that fork commands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                said = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                line = said.replace(b"\0", b" ").decode(errors="replace")
                if text in line and "from multiprocessing." not in line:
                    found.append(line)
    return found
