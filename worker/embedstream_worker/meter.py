"""What a worker counts and times, for its metrics and for its queue's pace. Costs a few microseconds a batch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from embedstream.metrics import metrics
from embedstream.metrics.metrics import Metric
from embedstream.records import ShardRecord
from embedstream_worker.pipeline import Life

Stage = Literal["decode", "tokenize", "infer", "finish", "write", "commit"]


class Busy:
    """Seconds in which at least one of several threads was at work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._working = 0
        self._seconds = 0.0
        self._counted = clock()

    def begin(self) -> None:
        self._change(1)

    def end(self) -> None:
        self._change(-1)

    @property
    def seconds(self) -> float:
        """Until now."""
        return self._change(0)

    def _change(self, by: int) -> float:
        with self._lock:
            now = self._clock()
            if self._working:
                self._seconds += now - self._counted
            self._counted = now
            self._working += by
            return self._seconds


class _DeviceBusy(Collector):
    """Asked when it is scraped: a batch may be in the model for long."""

    def __init__(self, queue: str, busy: Busy) -> None:
        self._queue = queue
        self._busy = busy

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = metrics.DEVICE_BUSY
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        family.add_metric([self._queue], self._busy.seconds)
        yield family


class Meter:
    """One worker's metrics, in a registry of their own. Its methods may be called from any thread."""

    def __init__(self, queue: str, life: Life) -> None:
        self.registry = CollectorRegistry()
        self._queue = queue
        ProcessCollector(registry=self.registry)
        self._claimed = self._counter(metrics.CLAIMED_BLOCKS)
        self._redelivered = self._counter(metrics.REDELIVERED_BLOCKS)
        self._shards = self._counter(metrics.COMMITTED_SHARDS)
        self._blocks = self._counter(metrics.COMMITTED_BLOCKS)
        self._rows = self._counter(metrics.COMMITTED_ROWS)
        self._failed = self._counter(metrics.FAILED_ROWS)
        self._truncated = self._counter(metrics.TRUNCATED_ROWS)
        self._duplicates = self._counter(metrics.DUPLICATE_ROWS)
        self._tokens = self._counter(metrics.COMMITTED_TOKENS)
        self._padding = self._counter(metrics.PADDING_TOKENS)
        self._batch_tokens = self._histogram(metrics.BATCH_TOKENS).labels(queue)
        stages = self._histogram(metrics.STAGE_SECONDS)
        self._stages: dict[Stage, Histogram] = {stage: stages.labels(queue, stage) for stage in get_args(Stage)}
        self._device, self._working, self._taken = Busy(), Busy(), 0.0
        self.registry.register(_DeviceBusy(queue, self._device))
        self._warm_up = self._gauge(metrics.WARM_UP).labels(queue)
        self._gauge(metrics.READY).labels(queue).set_function(lambda: not life.unready())
        self._info = self._gauge(metrics.WORKER_INFO)

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Around one piece of a stage's work."""
        self._working.begin()
        begun = time.monotonic()
        try:
            yield
        finally:
            self._stages[name].observe(time.monotonic() - begun)
            self._working.end()

    @contextlib.contextmanager
    def batch(self, tokens: int) -> Iterator[None]:
        """Around one batch in the model."""
        self._batch_tokens.observe(tokens)
        with self.stage("infer"):
            self._device.begin()
            try:
                yield
            finally:
                self._device.end()

    def claimed(self, deliveries: int) -> None:
        """A block came, for so many-th time."""
        self._claimed.inc()
        if deliveries > 1:
            self._redelivered.inc()

    def committed(self, record: ShardRecord) -> None:
        """A shard is committed."""
        self._shards.inc()
        self._blocks.inc(len(record.blocks))
        self._rows.inc(record.rows)
        self._failed.inc(record.failed)
        self._truncated.inc(record.truncated)
        self._duplicates.inc(record.duplicates)
        self._tokens.inc(record.tokens)
        self._padding.inc(record.padded - record.tokens)

    def warm(self, seconds: float) -> None:
        """The warm-up is over."""
        self._warm_up.set(seconds)

    def loaded(self, worker: str, model: str, engine: str, device: str, dtype: str) -> None:
        """The model is loaded."""
        self._info.labels(self._queue, worker, model, engine, device, dtype).set(1)

    def take_worked(self) -> float:
        """Seconds since the last call in which any stage was at work. For the writer, and while nothing is held."""
        worked = self._working.seconds
        since, self._taken = worked - self._taken, worked
        return since

    def _counter(self, metric: Metric) -> Counter:
        made = Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        return made.labels(self._queue)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)
