"""One coordinator: the dispatcher, and the processes that do the work, each started again when it ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import msgspec
import redis
from prometheus_client import CollectorRegistry

from embedstream.cli.logs import LogFormat, identify
from embedstream.cli.starting import environment, python_command
from embedstream.errors import BrokerError
from embedstream.keys import COORDINATORS
from embedstream.metrics.exposition import Exposition, QueueCollector
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import CoordinatorRecord, heartbeat, leave
from embedstream.server.connection import connect, explaining, mask
from embedstream.server.foreign import reading
from embedstream.server.preflight import check, refuse_few_rights, shortcomings
from embedstream.server.troubles import trouble, waiting
from embedstream_coordinator.context import Context
from embedstream_coordinator.dispatching import Dispatcher
from embedstream_coordinator.slot import Plan

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.5
"""Between two looks of the dispatcher: some commands each, on a server that carries thousands a second."""

EXPIRE_SECONDS = 15.0
"""A coordinator that said nothing for so long counts as gone, as a worker does."""

RESTART_SECONDS = 1.0
"""A process that ended is started again no sooner: while Redis is away they all end."""

OVER_SECONDS = 10.0
"""A trouble that was not met for so long is over: some times as long as a process takes to meet it again."""

STOP_SECONDS = 8.0
"""For the processes to end when this one is told to: below the 10 s that containers are given."""


class Coordinator:
    """A context manager would hide that `run` is all of its life."""

    def __init__(self, context: Context, processes: int, log_format: LogFormat) -> None:
        self._context = context
        self._stopping = threading.Event()
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.record = CoordinatorRecord(
            name=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            processes=processes,
            input_roots=context.input_roots,
            output_roots=tuple(map(mask, context.output_roots)),
        )
        self._slots = [_Slot(context, name, number, log_format) for number in range(processes)]
        self._troubles: dict[str, float] = {}
        """What has been said, by when it was last met (`time.monotonic`)."""
        self._begun = False

    def stop(self) -> None:
        """May be called from a signal handler."""
        self._stopping.set()

    def unready(self) -> str:
        """Why this coordinator does nothing at the moment, the empty string if it does its work."""
        return next(iter(self._troubles), "" if self._begun else "starting")

    def run(self) -> None:
        """Until told to stop."""
        dispatcher, broker = Dispatcher(self._context), self._context.broker()
        try:
            while not self._stopping.is_set():
                for slot in self._slots:
                    self._met(slot.keep_running())
                alive = self._try(COORDINATORS, lambda: heartbeat(broker, self.record, EXPIRE_SECONDS))
                if self._try("what lies in Redis", dispatcher.round) and alive:
                    self._begun = True
                self._forget()
                self._stopping.wait(ROUND_SECONDS)
        finally:
            self._end(broker)

    def _try(self, what: str, step: Callable[[], None]) -> bool:
        """Whether it could be done. Raises `redis.RedisError` for what waiting does not mend."""
        try:
            with reading(what):
                step()
        except BrokerError as error:
            self._met(str(error))
        except redis.RedisError as error:
            clause = trouble(error)
            if clause is None:
                raise
            self._met(waiting(clause, self._context.redis_url))
        else:
            return True
        return False

    def _met(self, what: str) -> None:
        """Say it, once while it lasts."""
        if what and what not in self._troubles:
            log.warning(what)
        if what:
            self._troubles[what] = time.monotonic()

    def _forget(self) -> None:
        """What was not met for some time is over."""
        since = time.monotonic() - OVER_SECONDS
        before, self._troubles = self._troubles, {what: at for what, at in self._troubles.items() if at > since}
        if before and not self._troubles:
            log.warning("all is well again")

    def _end(self, broker: Broker) -> None:
        for slot in self._slots:
            slot.tell_to_stop()
        end = time.monotonic() + STOP_SECONDS
        for slot in self._slots:
            slot.end(end)
        try:
            leave(broker, self.record.name)
        except redis.RedisError as error:
            log.debug("not signed off: %s", error)  # its record expires


class _Slot:
    """One process, started when it is not there."""

    def __init__(self, context: Context, coordinator: str, number: int, log_format: LogFormat) -> None:
        self._context = context
        self._log_format = log_format
        self._coordinator = coordinator
        self._name = f"{coordinator}-{number}"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._starts = 0

    def keep_running(self) -> str:
        """Start the process if it is not there; why the one before ended, if it said so."""
        if self._process is not None and self._process.poll() is None:
            return ""
        if time.monotonic() - self._started < RESTART_SECONDS:
            return ""
        why = self._last_words()
        self._started = time.monotonic()
        self._starts += 1
        # A name of its own for each life: RQ refuses one that seems to be alive.
        plan = Plan(
            coordinator=self._coordinator,
            name=f"{self._name}-{self._starts}",
            log_format=self._log_format,
            context=self._context,
        )
        self._close()
        self._process = subprocess.Popen(
            python_command("embedstream_coordinator.slot"),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(plan) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            log.warning("a process of this coordinator ended as it began")
        return why

    def _last_words(self) -> str:
        if self._process is None or self._process.stdout is None:
            return ""
        # What it was doing may still go on for a moment and hold the other end: what is not there now never comes.
        os.set_blocking(self._process.stdout.fileno(), False)
        return (self._process.stdout.read() or b"").decode(errors="replace")

    def tell_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def end(self, until: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        for end in (self._process.stdin, self._process.stdout) if self._process is not None else ():
            if end is not None:
                end.close()


def serve(context: Context, processes: int, log_format: LogFormat, listen: tuple[str, int] | None) -> None:
    """Run a coordinator until SIGTERM or SIGINT; a second signal ends it at once.

    `listen`: host and port of /metrics, /healthz and /readyz.
    """
    coordinator = Coordinator(context, processes, log_format)
    identify(coordinator=coordinator.record.name)
    asked = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()
        coordinator.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    url = context.redis_url
    with connect(url, retries=0) as client, explaining(url):
        check(client, url)
        refuse_few_rights(client, url, None)
        for shortcoming in shortcomings(client, url):
            log.warning(shortcoming)
    log.info(
        "coordinator %s: %d processes, reads below %s, writes below %s",
        coordinator.record.name,
        processes,
        ", ".join(coordinator.record.input_roots),
        ", ".join(coordinator.record.output_roots),
    )
    for root in (*context.input_roots, *context.output_roots):
        if root.startswith("/") and not Path(root).is_dir():
            log.warning("%s: no such folder, so nothing below it is found here: is its disk mounted?", root)
    if listen is not None:
        registry = CollectorRegistry()
        registry.register(QueueCollector(url))
        served = Exposition(*listen, registry, lambda: "", coordinator.unready)
        log.info("metrics at %s", served.url)
    with explaining(url):
        coordinator.run()
