"""One worker's life: load the model, warm it up, run the stages, leave cleanly."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from embedstream.broker import Broker, WorkerRecord
from embedstream.connection import check, connect
from embedstream.settings import WorkerSettings
from embedstream_worker.engines.base import Engine
from embedstream_worker.held import EmbeddedGroup, Held, TokenizedGroup, Window
from embedstream_worker.housekeeping import Housekeeping
from embedstream_worker.infer import Infer, Urgent
from embedstream_worker.intake import Intake
from embedstream_worker.interactive import Interactive
from embedstream_worker.jobs import Jobs, WorkerModel
from embedstream_worker.lease import Leases
from embedstream_worker.pipeline import Channel, Life, start_stage
from embedstream_worker.tokenize import Tokenize
from embedstream_worker.write import Write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker is asked to be."""

    redis_url: str
    queue: str
    model: WorkerModel
    roots: tuple[str, ...]
    settings: WorkerSettings
    burst: bool = False


class Worker:
    """Runs in the calling thread until its work is done, a stage fails, or `life.stop()` is called from anywhere."""

    def __init__(self, plan: WorkerPlan, engine: Engine, ready: Callable[[str], None] = log.info) -> None:
        self._plan = plan
        self._engine = engine
        self._ready = ready
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.life = Life()
        self._held = Held()
        self._state = "starting"
        self._started = time.time()
        self._warm_up_seconds = 0.0
        self._write: Write | None = None

    def run(self) -> None:
        """Raises whatever ended a stage."""
        check(connect(self._plan.redis_url), self._plan.redis_url)
        self._engine.start()
        gone = threading.Event()
        leases = Leases(self._broker(), self.name, self._held, self.life, self._plan.settings, self._record)
        try:
            signs = threading.Thread(target=leases.run, args=(gone.wait,), name="leases", daemon=True)
            signs.start()
            self._serve()
            self._state = "draining"
        finally:
            gone.set()
            signs.join(timeout=10)
            self._leave()
            self._engine.close()
        if self.life.failure is not None:
            raise self.life.failure

    def _serve(self) -> None:
        plan, engine, life = self._plan, self._engine, self.life
        settings = plan.settings
        batch_tokens = settings.batch_tokens or engine.info.batch_tokens
        self._warm_up_seconds = engine.warm_up(batch_tokens)
        windows: Channel[Window] = Channel(1)
        tokenized: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
        embedded: Channel[list[EmbeddedGroup]] = Channel(1)
        jobs = Jobs(self._broker(), plan.redis_url, engine, plan.model, plan.roots)
        intake = Intake(self._broker(), jobs, self._held, life, windows, self.name, settings, plan.burst)
        tokenize = Tokenize(engine.tokenizer(), self._broker(), self.name, self._held, life, windows, tokenized)
        infer = Infer(engine, batch_tokens, life, tokenized, embedded)
        self._write = Write(self._broker(), jobs, engine.info, self.name, self._held, life, embedded, settings)
        interactive = Interactive(
            engine, engine.tokenizer(), self._broker(), self.name, life, tokenized, int(settings.lease_seconds * 1000)
        )
        housekeeping = Housekeeping(self._broker(), plan.redis_url, plan.roots)
        threading.Thread(target=housekeeping.run, args=(life.stopping.wait,), name="housekeeping", daemon=True).start()
        self._state = "ready"
        self._broker().heartbeat(self._record(), 3 * settings.heartbeat_seconds)
        self._ready(f"ready after {time.time() - self._started:.1f} s (warm-up {self._warm_up_seconds:.1f} s)")
        asking = start_stage("interactive", life, interactive.run, [])
        stages = [
            start_stage("intake", life, intake.run, [windows]),
            start_stage("tokenize", life, tokenize.run, [windows, tokenized]),
            start_stage("infer", life, infer.run, [tokenized, embedded]),
            start_stage("write", life, self._write.run, [embedded]),
        ]
        for stage in stages:
            stage.join()
        asking.join(timeout=2)

    def _record(self) -> WorkerRecord:
        info, rows, tokens = self._engine.info, 0, 0
        if self._write is not None:
            rows, tokens = self._write.rows, self._write.tokens
        return WorkerRecord(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=self._plan.model.name,
            fingerprint=info.fingerprint,
            engine=info.engine,
            device=info.device,
            dtype=info.dtype,
            roots=self._plan.roots,
            state="draining" if self.life.stopping.is_set() else self._state,
            started=self._started,
            warm_up_seconds=self._warm_up_seconds,
            rows=rows,
            tokens=tokens,
            lease_seconds=self._plan.settings.lease_seconds,
        )

    def _leave(self) -> None:
        """Take this worker off the queue's lists; a consumer that still holds something stays until it is swept."""
        broker = self._broker()
        try:
            for job in broker.active_jobs():
                broker.run(broker.retire(broker.keys.blocks(job), self.name))
            broker.run(broker.retire(broker.keys.interactive, self.name))
            broker.leave(self.name)
        except redis.RedisError as error:
            log.warning("could not take leave of Redis (%s): this worker's name expires by itself", error)

    def _broker(self) -> Broker:
        """A broker with a connection of its own: no thread waits for another's reply."""
        return Broker(connect(self._plan.redis_url), self._plan.queue)
