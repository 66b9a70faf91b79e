"""One worker's life: load the model, warm it up, run the stages, leave cleanly."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import redis

from embedstream.errors import ModelError
from embedstream.masking import mask
from embedstream.queue.broker import Broker
from embedstream.queue.workers import Given, WorkerRecord
from embedstream.server.connection import Connect, connect
from embedstream.server.foreign import leaving_out
from embedstream.server.preflight import check
from embedstream.settings import WorkerSettings
from embedstream.tracing import open_traces
from embedstream_worker import earlier_starts, known_models
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import Engine, EngineInfo, OutOfMemory
from embedstream_worker.engines.phases import listening
from embedstream_worker.engines.precision import tokenizer_threads
from embedstream_worker.express import Express
from embedstream_worker.held import EmbeddedGroup, TokenizedGroup, Window, hand_back
from embedstream_worker.housekeeping import Housekeeping
from embedstream_worker.infer import Infer, Urgent
from embedstream_worker.intake import Intake
from embedstream_worker.interactive import Interactive
from embedstream_worker.jobs import Jobs
from embedstream_worker.lease import Leases
from embedstream_worker.meter import Meter
from embedstream_worker.pipeline import Channel, Life, start_stage
from embedstream_worker.probe import Trial, try_budgets
from embedstream_worker.prompts import Prompts
from embedstream_worker.shared import RETRIES, Shared
from embedstream_worker.tokenize import Tokenize
from embedstream_worker.watchdog import LOADING, WARMING_UP, Watchdog
from embedstream_worker.write import Write

log = logging.getLogger(__name__)


SIGNAL_SECONDS = 0.5
"""A signal that the system gave to another thread (it does so after SIGCONT) is seen when the main thread wakes."""

LEAVE_SECONDS = 5.0
"""How long a thread that does not hold work is waited for at the end."""


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker is asked to be."""

    redis_url: str
    queue: str
    engine: EngineOptions
    roots: tuple[str, ...]
    settings: WorkerSettings
    burst: bool = False
    alone: bool = False
    """Whether no other worker can be on the queue: what earlier ones died with need not wait for its lease."""
    warm_up: bool = True
    """Whether the smallest, longest and fullest batches run before the worker says that it is ready."""
    listen: tuple[str, int] | None = None
    """Host and port of /metrics, /healthz and /readyz."""


class Worker:
    """Runs in the calling thread until its work is done, a stage fails, or `life.stop()` is called from anywhere."""

    def __init__(
        self,
        plan: WorkerPlan,
        load: Callable[[], Engine],
        connect: Connect = connect,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        """`load` gives the engine. `last` is called when a process ends itself because a thread of it hangs."""
        self._plan = plan
        self._last = last
        self._load = load
        self._connect = connect
        self.life = Life()
        self.meter = Meter(plan.queue, self.life)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._shared = Shared(self.name, self._broker, plan.settings, self.life, self.meter)
        self._started = time.time()
        self._warm_up_seconds = 0.0
        self._info: EngineInfo | None = None  # once the model is loaded
        self._jobs: Jobs | None = None

    def run(self) -> None:
        """Raises whatever ended a stage; `BrokerError` or `ModelError` if it cannot even start."""
        check(self._connect(self._plan.redis_url, 0), self._plan.redis_url)
        gone = threading.Event()
        leases = Leases(self._shared, self._record)
        signs = start_stage("leases", self.life, lambda: leases.run(gone.wait), [])
        watchdog = Watchdog(self._shared, self._leave_hanging)
        watching = start_stage("watchdog", self.life, lambda: watchdog.run(gone.wait), [])
        try:
            self._live()
        finally:
            gone.set()
            signs.join(LEAVE_SECONDS)
            watching.join(LEAVE_SECONDS)
            self._leave()
        if self.life.failure is not None:
            raise self.life.failure

    def _live(self) -> None:
        """Load the model, warm it up, run the stages, unless told to stop meanwhile."""
        with self._shared.activity.starting(LOADING), listening(self._shared.activity.enter):
            engine = self._load()
        with closing(engine):
            info, model = engine.info, self._plan.engine.model
            self._info = info
            known_models.remember(model, info.fingerprint)
            self.meter.loaded(self.name, model, info.engine, info.device, info.dtype)
            if self.life.stopping.is_set():
                return
            begun = time.perf_counter()
            with self._shared.activity.starting(WARMING_UP):
                trial = self._warm_up(engine)
            self._warm_up_seconds = time.perf_counter() - begun
            if not self.life.stopping.is_set():
                self._serve(engine, trial)

    def _warm_up(self, engine: Engine) -> Trial:
        """The token budget of a batch: the largest of those wanted, or a half of it, and so on, that fits."""
        given, info = self._plan.settings.batch_tokens, engine.info
        batch_tokens = given or info.batch_tokens
        if not self._plan.warm_up:
            return Trial(batch_tokens, 0.0)
        tries = info.device == "cpu" and given is None
        if tries and (known := earlier_starts.recall(info)) is not None:
            engine.warm_up(1)  # all that is left to be paid once: on a CPU, large batches cost no more at first
            return known
        while True:
            try:
                engine.warm_up(batch_tokens)
                if not tries:
                    return try_budgets(engine, (batch_tokens,))
                trial = try_budgets(engine, (batch_tokens, batch_tokens // 2, batch_tokens * 2))
                if batch_tokens == info.batch_tokens:  # how little memory there was just now says nothing of later
                    earlier_starts.remember(info, trial)
                return trial
            except OutOfMemory as error:
                if batch_tokens == 1:
                    raise ModelError(
                        f"model {self._plan.engine.model} does not fit into this device: {error}"
                    ) from error
                batch_tokens //= 2
                log.warning("no memory for a full batch (%s); trying %d tokens", error, batch_tokens)

    def _serve(self, engine: Engine, trial: Trial) -> None:
        plan, shared, life = self._plan, self._shared, self.life
        windows: Channel[Window] = Channel(1)
        tokenized: Channel[list[TokenizedGroup] | Urgent] = Channel(1)
        embedded: Channel[list[EmbeddedGroup]] = Channel(1)
        prompts = Prompts(shared, engine.tokenizer(), tokenized, plan.alone)
        jobs = self._jobs = Jobs(
            self._broker(), plan.redis_url, engine, plan.engine, plan.roots, prompts.length, speak=self._speak
        )
        housekeeping = Housekeeping(self._broker(), plan.redis_url, plan.roots)
        if plan.alone:
            self._inherit()
        outputs = engine.info.outputs.values()
        ahead = Ahead(
            trial.batch_tokens,
            engine.info.padded,
            trial.tokens_per_second,
            plan.settings.window_tokens,
            row_bytes=sum(output.row_bytes for output in outputs),
            token_bytes=sum(output.token_bytes for output in outputs),
        )
        self.meter.warm(self._warm_up_seconds)
        intake = Intake(shared, jobs, ahead, windows, plan.burst, housekeeping.hopeless)
        tokenize = Tokenize(shared, engine.tokenizer, tokenizer_threads(), ahead, windows, tokenized)
        infer = Infer(shared, engine, trial.batch_tokens, ahead, tokenized, embedded)
        write = Write(shared, jobs, engine.info, embedded)
        express = Express(shared, engine, infer, tokenized)
        traces = open_traces("embedstream-worker", self.name)
        interactive = Interactive(shared, engine, engine.tokenizer(), express, traces)
        life.serving = True
        self._speak()
        log.info("ready after %.1f s (warm-up %.1f s)", time.time() - self._started, self._warm_up_seconds)
        stages = [
            start_stage("intake", life, intake.run, [windows]),
            start_stage("tokenize", life, tokenize.run, [windows, tokenized]),
            start_stage("infer", life, infer.run, [tokenized, embedded]),
            start_stage("write", life, write.run, [embedded]),
        ]
        beside = [
            start_stage("interactive", life, interactive.run, []),
            start_stage("housekeeping", life, lambda: housekeeping.run(life.stopping.wait), []),
        ]
        for stage in stages:
            while stage.is_alive():
                stage.join(SIGNAL_SECONDS)
        for stage in beside:
            stage.join(LEAVE_SECONDS)
        express.close(LEAVE_SECONDS)
        traces.close()
        if earlier_starts.recall(engine.info) == trial:  # that pace was of texts that are all alike
            earlier_starts.remember(engine.info, Trial(trial.batch_tokens, ahead.tokens_per_second))

    def _speak(self) -> None:
        try:
            self._broker(0).heartbeat(self._record(), self._plan.settings.expire_seconds)
        except redis.RedisError as error:
            log.warning("could not give a sign of life (%s), trying again", error)

    def _record(self) -> WorkerRecord:
        info, jobs, progress = self._info, self._jobs, self._shared.ledger.look(time.monotonic())
        phase, phase_seconds = self._shared.activity.start_phase()
        return WorkerRecord(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=self._plan.engine.model,
            fingerprint=info.fingerprint if info else "",
            engine=info.engine if info else "",
            device=info.device if info else "",
            dtype=info.dtype if info else "",
            roots=tuple(map(mask, self._plan.roots)),
            state=self.life.state,
            phase=phase,
            phase_seconds=phase_seconds,
            started=self._started,
            warm_up_seconds=self._warm_up_seconds,
            outputs={kind: Given(each.dim, each.normalized) for kind, each in info.outputs.items()} if info else {},
            max_length=info.max_length if info else 0,
            pooling=info.origin.pooling if info else "",
            rows=progress.total.rows,
            tokens=progress.total.tokens,
            lease_seconds=self._plan.settings.lease_seconds,
            in_hand=progress.in_hand,
            written={job: done.rows for job, done in progress.committed.items()},
            rates=progress.rates,
            refused=jobs.refused_for_good() if jobs else {},
            waits=jobs.waits() if jobs else {},
            remarks=jobs.remarks() if jobs else {},
        )

    def _leave(self) -> None:
        """Take this worker off the queue's lists, and hand back what it may still hold.

        After a failure that counts as a death, as what it held may be the cause; a request keeps its lease then.
        """
        broker, died = self._broker(0), self.life.failure is not None
        try:
            for stream in (*map(broker.keys.blocks, broker.active_jobs()), broker.keys.interactive):
                with leaving_out(stream):
                    if not died or stream != broker.keys.interactive:
                        hand_back(broker, stream, self.name, broker.pending(stream, self.name), died)
                    broker.run(broker.retire(stream, self.name))
            broker.leave(self.name)
        except redis.RedisError as error:
            log.warning("could not take leave of Redis (%s): this worker's name expires by itself", error)

    def _leave_hanging(self) -> None:
        self._leave()
        self._last()

    def _inherit(self) -> None:
        """Hand back what earlier workers died with. Raises `redis.RedisError`."""
        broker = self._broker()
        for job in broker.active_jobs():
            stream = broker.keys.blocks(job)
            with leaving_out(stream):
                for consumer in broker.lost(job, [self.name]):
                    hand_back(broker, stream, consumer, broker.pending(stream, consumer), died=True)

    def _broker(self, retries: int = RETRIES) -> Broker:
        """A broker with a connection of its own: no thread waits for another's reply."""
        return Broker(self._connect(self._plan.redis_url, retries), self._plan.queue)
