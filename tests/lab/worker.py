"""A worker in a thread of the test, on a queue of its own, with engines and connections that fail when told to."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
from e2e.harness import wait_until

from embedstream.jobs import JobSpec, JobState
from embedstream.keys import GROUP
from embedstream.queue.blocks import Block, Refusal, encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.packing import Packer
from embedstream.queue.steps import Code
from embedstream.server.connection import Connect, connect
from embedstream.settings import BlockLimits, WorkerSettings
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import Engine, EngineInfo, Results, Role, TokenBatch
from embedstream_worker.engines.hashing import HashingEngine, HashingTokenizer
from embedstream_worker.meter import Meter
from embedstream_worker.pipeline import Life
from embedstream_worker.probe import PASSAGE
from embedstream_worker.shared import Shared
from embedstream_worker.worker import Worker, WorkerPlan

BOUND = 1 << 30
HOUR_MS = 3_600_000

TEXTS = [f"text number {i} " + "word " * (i % 7) for i in range(64)]
BY_ID = {f"t{i}": text for i, text in enumerate(TEXTS)}
"""As `pack` numbers them."""


def pack(texts: Sequence[str | Refusal], rows_per_block: int, part: int = 0) -> list[Block]:
    """Texts as rows `t0`, `t1`, ... of a part."""
    packer, blocks = Packer(part, limits=BlockLimits(chunks=rows_per_block)), []
    for row, text in enumerate(texts):
        full = (
            packer.refuse(text)
            if isinstance(text, Refusal)
            else packer.add(row, f"t{row}", text, len(text.encode()), ())
        )
        if full is not None:
            blocks.append(full)
    last = packer.finish()
    return blocks if last is None else [*blocks, last]


def refusal(row: int) -> Refusal:
    return Refusal(row=row, id=None, code="bad_json", message="not JSON", original="{")


class ScriptedEngine:
    """The hashing engine with something done before each batch: wait, raise, or change the vectors."""

    in_flight = 1

    def __init__(self, before: Callable[[list[str]], None] = lambda _: None, nan: Sequence[str] = ()) -> None:
        """`before` is called with the batch's texts; texts in `nan` get a vector of NaN."""
        self._engine = HashingEngine()
        self._before = before
        self._nan = set(nan)
        self.closed = False

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def warm_up(self, batch_tokens: int) -> None:
        self._engine.warm_up(batch_tokens)

    def tokenizer(self) -> HashingTokenizer:
        return self._engine.tokenizer()

    def prompt(self, role: Role, prompt: str | None, prompt_name: str | None) -> str:
        return self._engine.prompt(role, prompt, prompt_name)

    def run(self, batch: TokenBatch) -> Results:
        texts = batch_texts(batch)
        if not texts[0].startswith(PASSAGE[:40]):  # a worker tries its pace before it takes a job
            self._before(texts)
        vectors = self._engine.run(batch)
        vectors["dense"][[text in self._nan for text in texts]] = np.nan
        return vectors

    def run_exact(self, batch: TokenBatch) -> Results:
        return self.run(batch)

    def close(self) -> None:
        self.closed = True


def batch_texts(batch: TokenBatch) -> list[str]:
    """The texts of a batch of the hashing tokenizer, whose tokens are their bytes."""
    return [
        batch.ids[start:end].tobytes().rstrip(b"\0").decode(errors="replace")
        for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    ]


SETTINGS = WorkerSettings(window_ms=20, lease_seconds=600)


def share(
    broker: Broker | None = None, life: Life | None = None, settings: WorkerSettings = SETTINGS, **given: Any
) -> Shared:
    """What the stages of the worker w1 share. Without a broker for one whose stages ask Redis for nothing."""
    broker, life = broker or Broker(connect("redis://127.0.0.1:1"), "q"), life or Life()
    return Shared("w1", lambda _: broker, settings, life, Meter("q", life), **given)


class Gate:
    """Holds the model back: `arrived` is set when it gets there, and it goes on once `open` is set."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.open = threading.Event()

    def __call__(self, _texts: list[str]) -> None:
        self.arrived.set()
        assert self.open.wait(60), "the gate was never opened"


class Running:
    """A worker in its thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float = 30) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the worker does not leave"

    def stop(self, seconds: float = 30) -> None:
        self.worker.life.stop()
        self.join(seconds)


class WorkerLab:
    """One queue on a real server, and one folder for outputs."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.broker = Broker(connect(url), f"q-{uuid.uuid4().hex[:12]}")
        self._running: list[Running] = []

    def spec(self, output: str = "out", **changed: Any) -> JobSpec:
        names = {"model": "hashing", "parts": ("records",)} | changed
        return JobSpec(queue=self.broker.queue, output=str(self.folder / output), **names)

    def create(self, spec: JobSpec) -> str:
        assert self.broker.run(self.broker.create(spec)).code in (Code.CREATED, Code.REOPENED)
        return spec.job

    def submit(self, job: str, blocks: Sequence[Block], seal: bool = True) -> None:
        for block in blocks:
            answer = self.broker.run(self.broker.submit(job, encode_block(block), BOUND))
            assert answer.code in (Code.OK, Code.DUPLICATE)
        if seal:
            assert self.broker.run(self.broker.seal(job, 0, len(blocks))).code is Code.OK

    def job(self, texts: Sequence[str | Refusal], rows_per_block: int = 8, output: str = "out", **changed: Any) -> str:
        """A job that is wholly submitted."""
        job = self.create(self.spec(output, **changed))
        self.submit(job, pack(texts, rows_per_block))
        return job

    def start(
        self,
        engine: Engine | None = None,
        load: Callable[[], Engine] = HashingEngine,
        connect: Connect = connect,
        burst: bool = False,
        model: str = "hashing",
        roots: Sequence[str] = (),
        **settings: Any,
    ) -> Running:
        """A worker whose leases outlast the test and whose engine meets no trial texts, unless it says otherwise.

        It has the engine, or loads one.
        """
        plan = WorkerPlan(
            redis_url=self.url,
            queue=self.broker.queue,
            engine=EngineOptions(model),
            roots=tuple(roots) or (str(self.folder),),
            settings=WorkerSettings(
                **{"lease_seconds": 600.0, "drain_seconds": 600.0, "window_ms": 20, "batch_tokens": 65_536, **settings}
            ),
            burst=burst,
        )
        running = Running(Worker(plan, (lambda: engine) if engine else load, connect=connect))
        self._running.append(running)
        return running

    def ended(self, job: str) -> bool:
        state = self.broker.state(job)
        return state is not None and JobState(state).ended

    def owners(self, job: str) -> dict[str, int]:
        """Who holds how many of a job's blocks."""
        client: Any = self.broker.client
        summary = client.xpending(self.broker.keys.blocks(job), "workers")
        return {owner["name"].decode(): owner["pending"] for owner in summary["consumers"] or ()}

    def expire_leases(self, job: str, blocks: int) -> None:
        """Let the leases of a job's first blocks run out now."""
        client: Any = self.broker.client
        stream = self.broker.keys.blocks(job)
        for row in client.xpending_range(stream, GROUP, "-", "+", blocks):
            client.xclaim(stream, GROUP, row["consumer"], 0, [row["message_id"]], idle=HOUR_MS, justid=True)

    def empty_redis(self) -> None:
        """What a restart without its data does to this queue."""
        keys = list(self.broker.client.scan_iter(f"{self.broker.keys.prefix}*", count=1000))
        if keys:
            self.broker.client.unlink(*keys)

    def close(self) -> None:
        for running in self._running:
            running.stop()
        self.empty_redis()


@contextmanager
def worker_lab(url: str, folder: Path) -> Iterator[WorkerLab]:
    lab = WorkerLab(url, folder)
    try:
        yield lab
    finally:
        lab.close()


def reply_is_lost(
    command: str,
    times: int = 1,
    when: Callable[..., bool] = lambda *_: True,
    on_loss: Callable[[], None] = lambda: None,
) -> Connect:
    """A `connect` whose clients lose the reply of so many runs of `command`, which the server has carried out.

    `when` sees the reply and the command's arguments; `on_loss` is called at each loss.
    """
    left, lock = [times], threading.Lock()

    def make(url: str, retries: int) -> redis.Redis:
        client: Any = connect(url, retries)
        carry_out = getattr(client, command)

        def lossy(*args: Any, **options: Any) -> Any:
            reply = carry_out(*args, **options)
            with lock:
                lost = left[0] > 0 and when(reply, *args)
                left[0] -= lost
            if lost:
                on_loss()
                raise redis.ConnectionError("the reply was lost")
            return reply

        setattr(client, command, lossy)
        return client  # type: ignore[no-any-return]

    return make


def finish(lab: WorkerLab, job: str, state: JobState = JobState.COMPLETED) -> None:
    """Wait until the job has ended, which must be like this."""
    wait_until(lambda: lab.ended(job), "the job to end", 30)
    assert lab.broker.state(job) == state
