"""One walk: a queue of its own, real processes that break where they are told, and a judge that trusts none of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from e2e.harness import assert_vectors, environment, read_errors, read_manifest, read_rows, wait_until
from lab.broker import Lab
from lab.hashing_reference import reference_vector
from lab.several import EMIT, INT8, of_hash, of_row

from embedstream.dataset.sinks import open_sink
from embedstream.failpoints import VARIABLE
from embedstream.jobs import job_id
from embedstream.keys import GROUP
from embedstream.lifecycle.opening import make_spec
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream_producer.trec_run import check_corpus
from embedstream_producer.updating import Updating

KILLED = -signal.SIGKILL
SOME_FAILED = 3
"""What embed-submit ends with: each corpus here has a bad row."""

LEASE_SECONDS = 1
PREFIX = "vectors:"


class Zygote:
    """Starts commands as processes without their loading. Callable from any thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(OPENBLAS_NUM_THREADS="1"),
        )
        self._lock = threading.Lock()

    def ask(self, **order: object) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

    def close(self) -> None:
        """End it and everything it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Order:
    """What a process is told to do to itself: `point[#pass]=action`."""

    text: str

    @property
    def point(self) -> str:
        return self.text.partition("=")[0].partition("#")[0]

    @property
    def action(self) -> str:
        return self.text.partition("=")[2].partition("*")[0]


class Process:
    """One running command."""

    def __init__(self, zygote: Zygote, log: Path, command: str, args: list[object], orders: str) -> None:
        self._zygote = zygote
        self._log = log
        for ending in ("out", "err"):
            Path(f"{log}.{ending}").touch()
        self._code: int | None = None
        self.name = f"{command} ({orders or 'whole'})"
        words = [str(arg) for arg in args]
        self._pid = int(zygote.ask(command=command, args=words, env={VARIABLE: orders}, log=str(log)))

    @property
    def out(self) -> str:
        return Path(f"{self._log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self._log}.err").read_text()

    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives."""
        if self._code is None:
            self._code = self._zygote.ask(pid=self._pid)
        return self._code

    def wait(self, code: int = 0, seconds: float = 40) -> None:
        """Until its end, which must be this one."""
        self._until(lambda: self.code() is not None, "to end", seconds)
        assert self.code() == code, f"{self.name} ended with {self.code()}\n{self.err}"

    def strike(self, order: Order) -> None:
        """Wait until it has done to itself what it was told."""
        if order.action == "pause":
            self._until(lambda: self.code() is not None or (self._has_obeyed(order) and self._stopped()), "to stop")
        else:
            self._until(lambda: self.code() is not None or self._has_obeyed(order), "to obey")
        assert self._has_obeyed(order), f"{self.name} ended with {self.code()}, never at {order.point}\n{self.err}"
        if order.action == "kill":
            self.wait(KILLED)

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 40) -> None:
        try:
            wait_until(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}\n{self.err}") from None

    def go_on(self) -> None:
        """After a pause."""
        os.kill(self._pid, signal.SIGCONT)

    def terminate(self) -> None:
        os.kill(self._pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.wait(KILLED)

    def _has_obeyed(self, order: Order) -> bool:
        return f"failpoint {order.point}: {order.action}\n" in self.err

    def _stopped(self) -> bool:
        return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@dataclass(frozen=True)
class Corpus:
    """Two parts of two blocks each, the last row of all being bad."""

    files: tuple[Path, ...]
    texts: Mapping[str, str]
    bad_line: int


def write_corpus(folder: Path, rows: int = 300) -> Corpus:
    """`rows` good rows in each of two files."""
    texts: dict[str, str] = {}
    files = tuple(folder / f"{name}.jsonl" for name in ("one", "two"))
    for path in files:
        mine = {f"{path.stem}-{i}": f"{path.stem} text {i} " + "word " * (i * 7 % 23) for i in range(rows)}
        path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in mine.items()))
        texts |= mine
    with files[-1].open("a") as file:
        file.write("{broken\n")
    return Corpus(files, texts, rows + 1)


@dataclass(frozen=True)
class Older:
    """A finished dataset of an older corpus: it has some texts of the new one, others under ids of it, and others."""

    output: Path
    same: int
    """Rows of the new corpus whose texts it has."""
    rows: int
    """In the new corpus as well, by id."""
    gone: int


def write_older(zygote: Zygote, folder: Path, corpus: Corpus) -> Older:
    """The dataset, made by an embed-submit with a worker of its own."""
    path, output = folder / "older.jsonl", folder / "older"
    some = [each for at, each in enumerate(corpus.texts.items()) if at % 7]
    texts = {id: text if at % 3 else f"{text} as it was" for at, (id, text) in enumerate(some)}
    same = sum(corpus.texts[id] == text for id, text in texts.items())
    gone = {f"gone-{i}": f"a text that is gone {i}" for i in range(50)}
    lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in (texts | gone).items())
    path.write_text("".join(lines))
    made = Process(zygote, folder / "older-log", "embed-submit", [path, "-o", output, "--model", "hashing", *EMIT], "")
    made.wait()
    return Older(output, same, len(texts), len(gone))


@functools.cache
def vector(text: str) -> npt.NDArray[np.float32]:
    """Recomputed from the text, once for all walks."""
    return reference_vector(text)


@dataclass
class Stage:
    """One job of several outputs on one queue."""

    zygote: Zygote
    url: str
    folder: Path
    corpus: Corpus
    to_redis: bool = False
    int8: bool = False
    """Whether one of its columns is in int8."""
    fleet: bool = True
    condemned: int = 0
    """Rows that are errors because a worker died with them noted as suspects."""
    repaired: int = 0
    """Rows that were such errors when the job ended, and that a retry has added since."""
    older: Older | None = None
    """What the job updates."""
    queue: str = field(default_factory=lambda: f"walk-{uuid.uuid4().hex[:12]}")

    def __post_init__(self) -> None:
        self.broker = Broker(connect(self.url), self.queue)
        self.processes: list[Process] = []
        self.prefix = f"{self.queue}:{PREFIX}"
        self.output = f"redis:?prefix={self.prefix}" if self.to_redis else str(self.folder / "out")
        self.job = job_id(self.queue, self.output)

    def update(self, older: Older) -> None:
        """From here on the job is one that updates a copy of this dataset."""
        self.older = older
        shutil.copytree(older.output, self.output)
        files = [str(file) for file in self.corpus.files]
        spec = make_spec(
            queue=self.queue,
            output=self.output,
            model="hashing",
            revision=None,
            parts=files,
            settings={"outputs": (*EMIT[1::2], *(INT8[1::2] if self.int8 else ()))},
        )
        parts = check_corpus(files, spec)
        made = Updating(spec, open_sink(self.output, spec), None).spec(parts, lambda _part, _read: None)
        assert made is not None
        self.job = made.job

    def start(self, command: str, *args: object, orders: str = "") -> Process:
        log = self.folder / f"{len(self.processes)}-{command}"
        process = Process(self.zygote, log, command, list(args), orders)
        self.processes.append(process)
        return process

    def submit(self, *args: object, orders: str = "") -> Process:
        """The one command that everything begins and goes on with."""
        common = [
            "-o",
            self.output,
            "--model",
            "hashing",
            "--queue",
            self.queue,
            "--json",
            *EMIT,
            *(INT8 if self.int8 else ()),
        ]
        where = ["--redis", self.url] if self.fleet else []
        where += ["--update"] if self.older else []
        return self.start("embed-submit", *self.corpus.files, *common, *where, *args, orders=orders)

    def worker(self, *args: object, orders: str = "") -> Process:
        common = ["--model", "hashing", "--queue", self.queue, "--redis", self.url, "--lease-seconds", LEASE_SECONDS]
        common += ["--batch-tokens", 65536]  # no trial
        roots = ["--output-root", self.folder, "--output-root", "redis:"]
        return self.start("embed-worker", *common, *roots, *args, orders=orders)

    def damage(self) -> None:
        """Write into the job's record what no program of ours writes."""
        self.broker.client.hset(self.broker.keys.job(self.job), "state", "nonsense")

    def cancel(self, orders: str = "") -> Process:
        return self.start("embed-cancel", self.job, "--redis", self.url, orders=orders)

    def ask(self, text: str, orders: str = "") -> Process:
        return self.start("ask", self.url, self.queue, text, orders=orders)

    def submitted(self) -> None:
        """The job, wholly with the workers; nobody waits for it."""
        self.submit("--detach").wait()

    def finish(self) -> None:
        """A healthy worker does what is left, and finalizes."""
        self.worker("--burst").wait()

    def expire_leases(self, stream: str) -> None:
        """Those who hold entries of a stream are waited for no longer."""
        client: Any = self.broker.client
        for row in client.xpending_range(stream, GROUP, "-", "+", 100):
            client.xclaim(stream, GROUP, row["consumer"], 0, [row["message_id"]], idle=3_600_000, justid=True)

    def expire_finalize_leases(self) -> None:
        """Finalizers that are gone are waited for no longer."""
        for job in self.broker.outbox():
            self.broker.free_finalize(job)

    def empty_redis(self) -> None:
        """What a restart without its data does to this queue."""
        client: Any = self.broker.client
        client.unlink(*client.scan_iter(f"{self.broker.keys.prefix}:*", count=1000))

    def close(self) -> None:
        for process in self.processes:
            if process.code() is None:
                process.kill()

    # Judging

    def judge(self) -> None:
        """Each row exactly once with its right vector, the bad one once among the errors; counters right; no leaks."""
        if self.to_redis:
            self._judge_hashes()
        else:
            self.judge_folder()
        if self.older is not None:
            left = {path.name for path in Path(self.output).iterdir()}
            assert not left.intersection(path.name for path in self.older.output.glob("part-*")), "older files stay"
        if self.fleet:
            self._judge_queue()

    def judge_folder(self) -> None:
        output = Path(self.output)
        manifest, rows = read_manifest(output), read_rows(output)
        errors = read_errors(output)
        poison = [error["id"] for error in errors if error["code"] == "poison"]
        assert len(poison) == len(set(poison)) == self.condemned
        others = [(error["file"], error["line"]) for error in errors if error["code"] != "poison"]
        assert others == [(str(self.corpus.files[-1]), self.corpus.bad_line)]
        found = {row["id"]: (row["text"], of_row(row, manifest)) for row in rows}
        self._judge_rows([*(row["id"] for row in rows), *poison], found)
        counted = tuple(manifest[name] for name in ("state", "partial", "rows", "failed"))
        assert counted == ("completed", False, len(self.corpus.texts) - self.condemned, 1 + self.condemned)
        left = [path.name for path in output.iterdir() if ".tmp-" in path.name]
        assert not left, "temporary files stay"
        if self.older is not None:
            self._judge_generation(self.older, manifest)

    def _judge_generation(self, older: Older, manifest: Mapping[str, Any]) -> None:
        (changes,) = manifest["changes"]
        counted = tuple(changes[name] for name in ("generation", "added", "changed", "removed"))
        rows = len(self.corpus.texts)
        assert counted == (1, rows - older.rows, older.rows - older.same, older.gone)
        assert (manifest["generation"], manifest["reused"]) == (1, older.same)

    def _judge_hashes(self) -> None:
        client: Any = self.broker.client
        found, manifest = {}, json.loads(client.get(f"{self.prefix}_manifest"))
        for key in client.scan_iter(f"{self.prefix}*-*", count=1000, _type="hash"):
            row = client.hgetall(key)
            found[row[b"id"].decode()] = (row[b"text"].decode(), of_hash(row, manifest))
        self._judge_rows(list(found), found)
        assert len(client.hgetall(f"{self.prefix}_errors")) == 1
        assert manifest["rows"] == len(self.corpus.texts)

    def _judge_rows(self, ids: list[str], rows: Mapping[str, tuple[str, Any]]) -> None:
        assert len(ids) == len(set(ids)), "some rows are doubled"
        assert set(ids) == set(self.corpus.texts), "ids in and ids out differ"
        for id, (text, _) in rows.items():
            assert text == self.corpus.texts[id], f"{id} has another row's text"
        assert_vectors({id: row[1] for id, row in rows.items()}, {id: vector(row[0]) for id, row in rows.items()})

    def _judge_queue(self) -> None:
        """What Redis counted, and that nothing of the job stays forever."""
        status = self.broker.status(self.job)
        counted = (status.state, status.rows, status.failed, status.done, status.blocks)
        died = self.condemned + self.repaired
        assert counted == ("completed", len(self.corpus.texts) - died, 1 + died, 4, 4)
        keys, client = self.broker.keys, self.broker.client
        waiting = (keys.jobs, keys.bytes, keys.finalize, keys.blocks(self.job))
        assert [key for key in waiting if client.exists(key)] == []
        lab = Lab(client)
        lab.broker = self.broker
        assert lab.left_behind() == []


@contextmanager
def stage(
    zygote: Zygote,
    url: str,
    folder: Path,
    corpus: Corpus,
    to_redis: bool = False,
    int8: bool = False,
    older: Older | None = None,
) -> Iterator[Stage]:
    """Leaves no process behind, nor keys."""
    made = Stage(zygote, url, folder, corpus, to_redis, int8)
    if older is not None:
        made.update(older)
    try:
        yield made
    finally:
        made.close()
