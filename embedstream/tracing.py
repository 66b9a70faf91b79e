"""Traces by OpenTelemetry: one text's way over gateway, queue and worker, sent by OTLP.

The variables of OpenTelemetry's own specification say where (`OTEL_EXPORTER_OTLP_ENDPOINT`). Without one nothing is
imported, and a step costs nothing. A trace goes to the next program as a `traceparent`, as W3C's Trace Context has it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

MOST_PARENTS = 16
"""Requests that go together, each of which has the step in its own trace."""

CLOSE_SECONDS = 2.0
"""For what is not sent yet when the program ends; a collector may be away."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")

Attributes = Mapping[str, str | int]


class Step:
    """A part of the way, in the trace of each text that takes it; ended by leaving the `with` block."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans = [span for span in spans if span.is_recording()]
        self.trace = " ".join(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            for context in (span.get_span_context() for span in self._spans)
        )
        """`traceparent` of each, with blanks between; empty: nothing is recorded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        for span in self._spans:
            span.end()

    def tell(self, attributes: Attributes, name: str | None = None) -> None:
        """Add to what is known of it."""
        for span in self._spans:
            span.set_attributes(attributes)
            if name is not None:
                span.update_name(name)

    def fail(self, error: str) -> None:
        """It did not end well. `error`: of few different ones, without anything of a text."""
        if not self._spans:
            return
        from opentelemetry.trace import Status, StatusCode

        for span in self._spans:
            span.set_attributes({"error.type": error})
            span.set_status(Status(StatusCode.ERROR))


NOTHING = Step()


class Traces:
    """Of one program."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """None: nothing is recorded."""
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("embedstream")

    def step(
        self,
        name: str,
        parents: str,
        kind: Literal["server", "client", "consumer", "internal"] = "internal",
        attributes: Attributes | None = None,
        begun_ns: int | None = None,
    ) -> Step:
        """A step that begins now, or at `begun_ns` (Unix time). `parents`: as `Step.trace`; what is none is left out.
        A server's step begins a trace of its own where none came.
        """
        if self._tracer is None:
            return NOTHING
        from opentelemetry.trace import SpanKind

        contexts = [_context(each) for each in parents.split()[:MOST_PARENTS]]
        found: list[Context | None] = [each for each in contexts if each is not None]
        if not found and kind == "server":
            found = [None]
        return Step(
            self._tracer.start_span(name, context, SpanKind[kind.upper()], attributes, start_time=begun_ns)
            for context in found
        )

    def passed(self, name: str, parents: str, begun_ns: int) -> None:
        """A step that has ended now. `begun_ns`: by whatever clock, which may be ahead of this machine's."""
        with self.step(name, parents, begun_ns=min(begun_ns, time.time_ns())):
            pass

    def close(self) -> None:
        """Send the rest, for `CLOSE_SECONDS` at most."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)


def open_traces(service: str, instance: str = "") -> Traces:
    """Those of a program, by the environment. What keeps them from being sent is logged, and ends no program.

    `service`: its name where the environment has none. `instance`: tells several of it from each other.
    """
    environment = os.environ
    if not any(environment.get(name) for name in _ENDPOINTS):
        return Traces()
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return Traces()
    if others := {environment.get(name) or "http/protobuf" for name in _PROTOCOLS} - {"http/protobuf"}:
        log.warning("no traces are sent by OTLP over %s: only http/protobuf is spoken here", ", ".join(sorted(others)))
        return Traces()
    try:
        return Traces(_provider(service, instance))
    except ModuleNotFoundError as error:
        log.warning("no traces are sent: %s is not installed: pip install 'embedstream[otel]'", error.name)
    except Exception as error:  # noqa: BLE001 - whatever it raises for a variable that it cannot use
        log.warning("no traces are sent: OpenTelemetry cannot be set up: %s: %s", type(error).__name__, error)
    return Traces()


def _provider(service: str, instance: str) -> TracerProvider:
    # Imported only here: the packages need not be installed, and take most of a second.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_INSTANCE_ID: instance} if instance else None)
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _context(parent: str) -> Context | None:
    """None for what is no `traceparent`."""
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Not the current context in place of one that cannot be read.
    context = TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None
