"""/metrics, /healthz and /readyz over HTTP, and the numbers of queues for whoever serves them.

Needs prometheus_client, which the extras `worker` and `coordinator` bring.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from typing import Any
from urllib.parse import urlsplit

import redis
from prometheus_client import CollectorRegistry, MetricsHandler, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from embedstream.errors import EmbedstreamError, UsageError
from embedstream.metrics import metrics
from embedstream.metrics.metrics import Metric
from embedstream.queue.broker import Broker
from embedstream.queue.queues import QueueLook, is_stalled, look_at_queue
from embedstream.server.connection import connect, mask

log = logging.getLogger(__name__)

REDIS_SECONDS = 3.0
"""How long a scrape waits for Redis: Prometheus waits 10 s for the whole of it."""

REQUEST_SECONDS = 10.0
"""A request that is not asked and answered in this time is cut off, whatever is said meanwhile."""

MOST_REQUESTS = 16
"""At once, each with a thread; one more cuts off the oldest. Prometheus and probes need two or three."""

WORKER_STATES = ("starting", "ready", "draining")
JOB_STATES = ("submitting", "running", "finalizing")

Trouble = Callable[[], str]
"""Answers why a probe fails, the empty string if it passes."""


class QueueCollector(Collector):
    """What lies in Redis, looked at when somebody asks. Works with no worker alive."""

    def __init__(self, redis_url: str, queues: Iterable[str] | None = None) -> None:
        """`queues`: those to look at; None: all with a sign of life in the last 30 days."""
        self._url = redis_url
        self._client = connect(redis_url, retries=0, timeout=REDIS_SECONDS)
        self._queues = None if queues is None else list(queues)
        self._silent = False

    def describe(self) -> list[GaugeMetricFamily]:
        """Told when this is registered, so that nobody is asked then."""
        return [family(metric) for metric in metrics.QUEUE_METRICS]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Looks at Redis."""
        looks: list[QueueLook] | None = None
        try:
            names = Broker(self._client, "").queues() if self._queues is None else self._queues
            looks = [look_at_queue(Broker(self._client, name)) for name in names]
            self._silent = False
        except (redis.RedisError, EmbedstreamError) as error:
            if not self._silent:
                self._silent = True
                log.warning("metrics of Redis at %s cannot be told (%s)", mask(self._url), error)
        up = family(metrics.REDIS_UP)
        up.add_metric([], 0 if looks is None else 1)
        yield up
        if looks is not None:
            yield from queue_families(looks)


def family(metric: Metric) -> GaugeMetricFamily:
    """Without samples."""
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)


def queue_families(looks: Iterable[QueueLook]) -> list[GaugeMetricFamily]:
    """Looks as Prometheus takes them."""
    made = {metric: family(metric) for metric in metrics.QUEUE_METRICS if metric is not metrics.REDIS_UP}
    for look in looks:
        values = {
            metrics.QUEUE_BYTES: look.bytes,
            metrics.QUEUE_BLOCKS: look.blocks,
            metrics.QUEUE_CLAIMED: look.claimed_blocks,
            metrics.QUEUE_OLDEST: look.oldest_block_seconds,
            metrics.QUEUE_TOKENS: look.tokens,
            metrics.QUEUE_PACE: look.worker_tokens_per_second,
            metrics.QUEUE_DRAIN: look.drain_seconds,
            metrics.QUEUE_STALLED: sum(is_stalled(status, look.workers) for status in look.jobs),
        }
        for metric, value in values.items():
            made[metric].add_metric([look.queue], value)
        workers = Counter(worker.state for worker in look.workers)
        jobs = Counter(status.state.value for status in look.jobs)
        # All states, also those in which there is none: a number that vanishes is no zero.
        for state in WORKER_STATES:
            made[metrics.QUEUE_WORKERS].add_metric([look.queue, state], workers[state])
        for state in JOB_STATES:
            made[metrics.QUEUE_JOBS].add_metric([look.queue, state], jobs[state])
    return list(made.values())


class Exposition:
    """An HTTP server in threads of its own, from construction to `close`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, unhealthy: Trouble, unready: Trouble) -> None:
        """Port 0: any free one, see `url`.

        Raises:
            UsageError: nobody can listen there.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]

        class Handler(_Handler):
            probes = {"/healthz": unhealthy, "/readyz": unready}  # noqa: RUF012 - set once, here

        Handler.registry = registry

        class Server(_Server):
            address_family = AF_INET6 if ":" in host else AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(f"metrics cannot be served at {host} port {port}: {why}: choose others (--metrics-host, "
                             "--metrics-port)") from error  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Answers everybody, and lets nobody keep it: few requests at once, none for long."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self._open: dict[socket, float] = {}
        self._opened = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._opened:
            if len(self._open) >= MOST_REQUESTS:
                self._cut_off(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called by `serve_forever` after each request, and twice a second."""
        with self._opened:
            late = time.monotonic() - REQUEST_SECONDS
            for request in [request for request, since in self._open.items() if since < late]:
                self._cut_off(request)

    def _cut_off(self, request: socket) -> None:
        """Its thread, waiting for more or to be rid of an answer, ends at once."""
        del self._open[request]
        with contextlib.suppress(OSError):
            request.shutdown(SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._opened:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as socketserver calls it
        if not isinstance(sys.exception(), OSError):  # a connection that is gone is its caller's affair
            log.exception("a request for metrics or a probe cannot be answered")


class _Handler(MetricsHandler):
    probes: dict[str, Trouble]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/metrics":
            try:
                choose_encoder(self.headers.get("Accept", ""))
            except Exception:  # noqa: BLE001 - whatever a header that makes no sense leads to
                del self.headers["Accept"]
            super().do_GET()
        elif path in self.probes:
            trouble = self.probes[path]()
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK, trouble or "ok")
        else:
            self._answer(HTTPStatus.NOT_FOUND, f"nothing here: ask for /metrics, {', '.join(self.probes)}")

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
