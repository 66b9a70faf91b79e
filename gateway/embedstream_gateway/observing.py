"""What is known of every request: an id that goes on to workers' logs, its time, and how it ended."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.metrics import metrics
from embedstream.tracing import NOTHING, Traces

log = logging.getLogger(__name__)

current_id: ContextVar[str] = ContextVar("current_id", default="")
"""Of the request that is being answered."""

current_trace: ContextVar[str] = ContextVar("current_trace", default="")
"""`Step.trace` of it."""

_UNTRACED = frozenset(("/health", "/healthz", "/readyz", "/metrics"))
"""Asked for every few seconds, and of no interest."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)
"""Of every response, whatever it is taken for."""


class Observing:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry, traces: Traces) -> None:
        self._app = app
        self._traces = traces
        self._requests = Counter(
            metrics.GATEWAY_REQUESTS.name,
            metrics.GATEWAY_REQUESTS.help,
            metrics.GATEWAY_REQUESTS.labels,
            registry=registry,
        )
        self._seconds = Histogram(
            metrics.GATEWAY_SECONDS.name,
            metrics.GATEWAY_SECONDS.help,
            metrics.GATEWAY_SECONDS.labels,
            buckets=metrics.GATEWAY_SECONDS.buckets,
            registry=registry,
        )
        self._open = Gauge(metrics.GATEWAY_OPEN.name, metrics.GATEWAY_OPEN.help, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        id = request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = id
        current_id.set(id)

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode()), *_HEADERS]
            await send(message)

        self._open.inc()
        step = NOTHING
        if scope["path"] not in _UNTRACED:
            step = self._traces.step("request", headers.get("traceparent", ""), "server")
        current_trace.set(step.trace)
        with step:
            try:
                await self._app(scope, receive, answering)
            finally:
                self._open.dec()
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if route != "other" else "other"
                self._requests.labels(route, method, str(status or 499)).inc()
                self._seconds.labels(route).observe(time.perf_counter() - begun)
                about = {"http.request.method": method, "http.route": route, "http.response.status_code": status or 499}
                step.tell({**about, "embedstream.request_id": id}, f"{method} {route}")
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    step.fail(str(status))


def request_id(given: str | None) -> str:
    """The caller's own id, if it is one; else a new one."""
    return given if given is not None and _ID.fullmatch(given) else secrets.token_hex(8)
