"""The stage `e2e`: jobs from JSON lines through Redis and worker processes into Parquet."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedstream.metrics.metrics import DEVICE_BUSY, STAGE_SECONDS
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream_producer.embedded.programs import find_program
from gpu_stages import material
from gpu_stages.context import Bench
from gpu_stages.machine import kind_of
from gpu_stages.material import BERT_BASE
from gpu_stages.models import COMPILED, EAGER, USUAL

_QUEUE = "gpu"
_JOB_SECONDS = 15.0
_UNKNOWN_RATE = 1_000_000  # tokens a second, if the stage `bert` did not run
_READY_SECONDS = 90.0
_TICKS = os.sysconf("SC_CLK_TCK")


def measure(bench: Bench) -> None:
    """One worker, then two, each writing to disk and into memory. The server's files lie on disk."""
    folder = material.random_model(bench, BERT_BASE)
    rates = {form: _best_rate(bench, form) for form in (EAGER, COMPILED)}
    form = max(rates, key=lambda form: rates[form])
    total = 20_000 if bench.tiny else int((rates[form] or _UNKNOWN_RATE) * _JOB_SECONDS)
    corpus = bench.scratch / "corpus.jsonl"
    texts = material.RealText(bench).cut(material.lognormal_lengths(total), seed=1)
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(row), "text": text}) + "\n" for row, text in enumerate(texts))
    places = {"disk": bench.scratch, "memory disk": bench.memory}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_serve(bench.scratch))
        workers: list[_Worker] = []
        for count, order in ((1, ("disk", "memory disk")), (2, ("memory disk", "disk"))):
            workers.append(_Worker(bench, server, folder, form == COMPILED, count))
            stack.callback(workers[-1].stop)
            workers[-1].wait_ready(server)
            for place in order:
                what = f"JSON lines to Parquet, {count} worker{'s' * (count > 1)}, {place}"
                with bench.part(what):
                    _require_room(places[place], len(texts))
                    output = places[place] / f"vectors-{count}"
                    found = _run_job(server, workers, corpus, output, folder)
                    if rates[form]:
                        found["of_the_engine"] = round(found["tokens_per_second"] / rates[form], 3)
                    where = f"{USUAL}, {place} ({kind_of(places[place])})"
                    bench.note(
                        what, model=BERT_BASE.name, form=f"end to end, {form}, {count} at work", corpus=where, **found
                    )


def _require_room(place: Path, rows: int) -> None:
    """Workers wait for room on a full disk, which would be measured."""
    needed, free = 2 * 4 * 768 * rows, shutil.disk_usage(place).free
    if free < needed:
        raise RuntimeError(f"{place} has {free / 1e9:.1f} GB free, and vectors may take {needed / 1e9:.1f} GB")


def _best_rate(bench: Bench, form: str) -> float:
    rates = [figure["tokens_per_second"] for figure in bench.results.find("bert", form=form, corpus=USUAL)]
    return max(rates, default=0.0)


@dataclass(frozen=True)
class _Server:
    url: str
    pid: int


@contextlib.contextmanager
def _serve(scratch: Path) -> Iterator[_Server]:
    """A server with an append-only file. It belongs to this stage's session, and ends with it."""
    program = find_program()
    with tempfile.TemporaryDirectory(prefix="es-", dir="/tmp") as short:  # a socket's path ends at 107 bytes
        path = Path(short) / "redis.sock"
        data = scratch / "redis"
        data.mkdir(exist_ok=True)
        options = ["--port", "0", "--unixsocket", str(path), "--dir", str(data), "--save", "", "--appendonly", "yes"]
        process = subprocess.Popen([*program.command, *options], stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"{program.command[0]} ended with {process.returncode}")
                time.sleep(0.01)
            yield _Server(f"unix://{path}", process.pid)
        finally:
            process.kill()
            process.wait()


class _Worker:
    """One embed-worker process."""

    def __init__(self, bench: Bench, server: _Server, folder: Path, compiles: bool, number: int) -> None:
        self.port = _free_port()
        self._log = bench.scratch / f"worker-{number}.log"
        command = [sys.executable, "-m", "embedstream_worker", "--engine", "torch", "--device", str(bench.device)]
        places = ["--output-root", str(bench.scratch), "--output-root", str(bench.memory)]
        job = ["--model", str(folder), "--queue", _QUEUE, "--redis", server.url, "--metrics-port", str(self.port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, *places, *job, *["--compile"] * compiles], stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, server: _Server) -> None:
        """Raises `RuntimeError` with its last words if it does not get ready."""
        broker, end = Broker(connect(server.url), _QUEUE), time.monotonic() + _READY_SECONDS
        while not any(found.pid == self.pid and found.state == "ready" for found in broker.workers()):
            if self._process.poll() is not None or time.monotonic() > end:
                print(self._log.read_text(), flush=True)
                last = self._log.read_text().strip().splitlines()[-1:]
                raise RuntimeError(f"the worker did not get ready: {last}")
            time.sleep(0.05)

    def seconds_by_stage(self) -> dict[str, float]:
        """Of all its threads, since it was started; and how long a batch was in the model."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode()
        pattern = rf'^{STAGE_SECONDS.name}_sum{{.*stage="(\w+)".*}} (\S+)$'
        seconds = {stage: float(value) for stage, value in re.findall(pattern, lines, re.MULTILINE)}
        busy = re.findall(rf"^{DEVICE_BUSY.name}{{.*}} (\S+)$", lines, re.MULTILINE)
        return seconds | {"in the model": float(busy[0]) if busy else 0.0}

    def stop(self) -> None:
        print(self._log.read_text(), flush=True)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _run_job(server: _Server, workers: list[_Worker], corpus: Path, output: Path, folder: Path) -> dict[str, Any]:
    """One job to its end. Seconds are the job's own, from its creation to its manifest."""
    submit = [sys.executable, "-c", "from embedstream_producer.submit_cli import main; main()", str(corpus)]
    job = ["-o", str(output), "--redis", server.url, "--queue", _QUEUE, "--model", str(folder), "--quiet", "--json"]
    before, cpu_before = _seconds_by_stage(workers), _cpu(server, workers)
    done = subprocess.run([*submit, *job], capture_output=True, text=True, check=False)
    cpu = {name: round(seconds - cpu_before[name], 1) for name, seconds in _cpu(server, workers).items()}
    after = _seconds_by_stage(workers)
    if done.returncode:
        raise RuntimeError(f"embed-submit ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    report = json.loads(done.stdout)
    return {
        "tokens_per_second": round(report["tokens"] / report["seconds"]),
        "padding": report["padding"],
        "rows": report["rows"],
        "rows_per_second": round(report["rows"] / report["seconds"]),
        "seconds": round(report["seconds"], 1),
        "cpu_seconds": cpu,
        "stage_seconds": {stage: round(seconds - before.get(stage, 0.0), 1) for stage, seconds in after.items()},
    }


def _seconds_by_stage(workers: list[_Worker]) -> dict[str, float]:
    """Of all workers together."""
    each = [worker.seconds_by_stage() for worker in workers]
    return {stage: sum(some.get(stage, 0.0) for some in each) for stage in each[0]}


def _cpu(server: _Server, workers: list[_Worker]) -> dict[str, float]:
    """User and system seconds by process so far (Linux)."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # workers and the server still run: these are the producers
    others = {f"worker {number}": worker.pid for number, worker in enumerate(workers, 1)} | {"server": server.pid}
    return {"producer": used.ru_utime + used.ru_stime} | {name: _cpu_of(pid) for name, pid in others.items()}


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
