"""What is broken: a Redis server, workers, producers and gateways, processes of their own, watched over as by a
supervisor; and the gateways' callers.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis
from e2e.harness import Process, environment
from lab.forked import Forked
from lab.several import EMIT, INT8
from lab_engines import faulty

from chaos.callers import Caller, Seen
from chaos.corpora import Expected, edit_corpus, write_corpus
from embedstream.jobs import JobSpec
from embedstream_producer.embedded.programs import find_program

BIN = Path(sys.executable).parent
SPY = Path(__file__).parent / "spy"
QUEUE = "chaos"

GATEWAYS = 2

FINISHED = (0, 3)
CANCELLED = 4

WORKER_ORDERS = (
    *(f"{point}=cut" for point in ("commit.before", "claim.before", "sweep.before", "release.before")),
    *(f"{point}=kill" for point in ("commit.before", "commit.after", "file.written", "file.renamed", "claim.after")),
    "commit.before=cut",
    "commit.before=cut*5",
)
PRODUCER_ORDERS = (
    *(f"{point}={action}" for point in ("submit.before", "seal.before") for action in ("cut", "cut*5")),
    *(f"{point}=kill" for point in ("submit.before", "submit.after", "seal.before", "create.after")),
    *(f"finalized.before={action}" for action in ("cut", "kill")),
)
GATEWAY_ORDERS = (
    *(f"{point}={action}" for point in ("submit.before", "seal.before") for action in ("cut", "kill")),
    "create.after=kill",
)
"""Failpoints for new processes, at a random pass: places that a signal from outside would rarely meet."""


def free_port() -> int:
    """One that no gateway listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Server:
    """A Redis server with an append-only file, of which earlier copies are kept."""

    def __init__(self, place: Path) -> None:
        self.folder, self.copies = place / "redis", place / "copies"
        self.folder.mkdir()
        self.copies.mkdir()
        self.socket = place / "r.sock"
        self.url = f"unix://{self.socket}"
        self.client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5)
        self._log = (place / "redis.log").open("ab")
        self._copied = 0.0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes", "--auto-aof-rewrite-percentage", "0"]
        self.process = subprocess.Popen([*find_program().command, *options], stdout=self._log, stderr=self._log)
        self.wait()
        return self.process

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            with contextlib.suppress(redis.RedisError):
                self.client.ping()
                return
            time.sleep(0.05)
        raise RuntimeError("redis-server does not answer")

    def restart(self) -> None:
        """Killed, then started over what it had on disk."""
        self.kill()
        self._start()

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._start()

    def restart_older(self, rng: random.Random) -> bool:
        """Started over an earlier copy of its file; whether there is one."""
        copies = sorted(self.copies.iterdir())[-4:]
        if not copies:
            return False
        chosen = rng.choice(copies)
        self.kill()
        shutil.rmtree(self.folder)
        shutil.copytree(chosen, self.folder)
        for later in copies[copies.index(chosen) + 1 :]:
            shutil.rmtree(later)
        self._start()
        return True

    def keep_copy(self) -> None:
        """Copy the append-only file as it is now, every few seconds; a torn end is cut off when it is read."""
        now = time.monotonic()
        if now - self._copied > 2:
            self._copied = now
            shutil.copytree(self.folder, self.copies / f"{time.time():.2f}")
            for old in sorted(self.copies.iterdir())[:-8]:
                shutil.rmtree(old)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Job:
    """One corpus and its output; the same command again until it is finished."""

    number: int
    corpus: Path
    output: str
    expected: Expected
    process: Forked | None = None
    ends: list[int] = field(default_factory=list)
    finished: bool = False
    generation: int = 0
    """How often its corpus was edited and its output updated."""

    @property
    def several(self) -> bool:
        """Whether it has several outputs."""
        return self.number % 2 == 1


class World:
    """All of it. `tend` does what a supervisor does: a process that ended is started again."""

    def __init__(self, place: Path, outputs: Path, rng: random.Random, workers: int) -> None:
        self.place, self.outputs, self.rng = place, outputs, rng
        self.logs, self.strikes, self.spied = place / "logs", place / "strikes", place / "answers"
        for folder in (self.logs, self.strikes, outputs):
            folder.mkdir(exist_ok=True)
        self.server = Server(place)
        self.jobs: list[Job] = []
        self.workers: list[Forked] = []
        self.calm = False
        self.ordered = 0
        """Failpoints given to new processes."""
        self.worker_ends: list[int] = []
        for _ in range(workers):
            self.workers.append(self._start_worker())
        self.ports = [free_port() for _ in range(GATEWAYS)]
        self.gateways = [self._start_gateway(port) for port in self.ports]
        self.gateway_ends: list[int] = []
        self.seen = Seen()
        urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.callers = [
            Caller(urls, random.Random(rng.random()), self.seen, batches) for batches in (False, False, True)
        ]

    def new_job(self, rows: int, kind: str) -> Job:
        number = len(self.jobs)
        corpus = self.place / f"c{number}.jsonl"
        expected = write_corpus(corpus, self.rng, rows, harmful=number % 3 == 0)
        output = f"redis:?prefix=job{number}:" if kind == "redis" else str(self.outputs / f"job{number}")
        job = Job(number, corpus, output, expected)
        self.jobs.append(job)
        self.start(job)
        return job

    def edit(self, job: Job) -> None:
        """Another generation of a finished job's corpus: its output is brought up to date."""
        job.expected = edit_corpus(job.corpus, self.rng, job.expected)
        job.finished, job.generation = False, job.generation + 1
        self.start(job)

    def running(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    def tend(self) -> None:
        """Start processes again that have ended."""
        for place, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.worker_ends.append(worker.wait())
                self.workers[place] = self._start_worker()
        for place, gateway in enumerate(self.gateways):
            if gateway.poll() is not None:
                self.gateway_ends.append(gateway.wait())
                self.gateways[place] = self._start_gateway(self.ports[place])
        for job in self.running():
            assert job.process is not None
            code = job.process.poll()
            if code is None:
                continue
            job.ends.append(code)
            if code in FINISHED:
                job.finished = True
            else:
                self.start(job)

    def cancel(self, job: Job) -> None:
        """`embed-cancel`, whatever comes of it."""
        id = JobSpec(queue=QUEUE, output=job.output, model="hashing", parts=()).job
        self._run(f"cancel-{job.number}", [str(BIN / "embed-cancel"), id, "--redis", self.server.url]).wait(60)

    def stop(self) -> None:
        """Workers and gateways leave as they are asked to."""
        for worker in (*self.gateways, *self.workers):
            worker.send_signal(signal.SIGCONT)
            worker.send_signal(signal.SIGTERM)
        for worker in (*self.gateways, *self.workers):
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    def close(self) -> None:
        for caller in self.callers:
            caller.stop()
        ours = (*self.workers, *self.gateways, *(job.process for job in self.jobs if job.process))
        processes: list[Process] = [*ours, self.server.process]
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start_worker(self) -> Forked:
        command = [str(BIN / "embed-worker"), "--model", "hashing", "--queue", QUEUE, "--redis", self.server.url]
        command += ["--lease-seconds", "2", "--window-tokens", "4000", "--batch-tokens", "1000"]
        return self._run(
            "worker", [*command, "--output-root", str(self.outputs), "--output-root", "redis:"], WORKER_ORDERS
        )

    def _start_gateway(self, port: int) -> Forked:
        command = [str(BIN / "embed-serve"), "--redis", self.server.url, "--port", str(port), "--timeout", "10"]
        return self._run(f"gateway-{port}", [*command, "--files", str(self.outputs / "gateway")], GATEWAY_ORDERS)

    def start(self, job: Job) -> None:
        command = [str(BIN / "embed-submit"), str(job.corpus), "-o", job.output, "--redis", self.server.url]
        command += ["--queue", QUEUE, "--model", "hashing", "--quiet", "--max-errors", "100"]
        command += (*EMIT, *INT8) if job.several else ()
        command += ["--update"] if job.generation else []
        job.process = self._run(f"producer-{job.number}", command, PRODUCER_ORDERS)

    def _run(self, name: str, command: list[str], orders: Sequence[str] = ()) -> Forked:
        order = ""
        if orders and not self.calm and self.rng.random() < 0.5:
            point, _, action = self.rng.choice(orders).partition("=")
            order = f"{point}#{self.rng.randint(1, 4)}={action}"
            self.ordered += 1
        log = self.logs / f"{name}.log"
        return Forked(command, self._environment(order), err=log, out=log)

    def _environment(self, order: str = "") -> dict[str, str]:
        base = environment()
        engine = faulty(self.strikes)
        return (
            base
            | engine
            | {
                "PYTHONPATH": f"{SPY}:{engine['PYTHONPATH']}",
                "CHAOS_SPY": str(self.spied),
                "PYTHONFAULTHANDLER": "1",
                "EMBEDSTREAM_FAILPOINTS": order,
                "EMBEDSTREAM_STALL_SECONDS": "4",
                "EMBEDSTREAM_DRAIN_SECONDS": "2",
                "EMBEDSTREAM_QUEUE_BYTES": "60000",
            }
        )
