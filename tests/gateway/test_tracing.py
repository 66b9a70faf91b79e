"""Traces by OpenTelemetry: one text's way over gateway, queue and worker, as a collector receives it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from conftest import serve_redis
from e2e.harness import environment, fleet
from gateway.test_gathering import MODEL, Queue, request, settle
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from embedstream import tracing
from embedstream.tracing import Traces, open_traces
from embedstream_gateway.gathering import Gathering
from embedstream_gateway.observing import current_trace

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(frozen=True)
class Told:
    """A span as it was exported."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, str | int]
    failed: bool


@dataclass
class Collector:
    """Takes OTLP over HTTP."""

    spans: list[Told] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {pair.key: pair.value.string_value for pair in each.resource.attributes}
            self.spans += [
                Told(
                    about["service.name"],
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes},
                    span.status.code == 2,
                )
                for scope in each.scope_spans
                for span in scope.spans
            ]

    def of(self, trace: str) -> dict[str, Told]:
        return {span.name: span for span in self.spans if span.trace == trace}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector, and its address."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield collector, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_texts_way_is_one_trace(tmp_path: Path, collector: tuple[Collector, str]) -> None:
    found, url = collector
    with serve_redis() as redis, fleet(redis.url, tmp_path) as running:
        worker = running.start_worker(OTEL_EXPORTER_OTLP_ENDPOINT=url)
        gateway, address = running.start_gateway(OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_SERVICE_NAME="front-door")
        body = {"model": "hashing", "input": "a text"}
        sent = {"traceparent": CALLER, "X-Request-Id": "mine-1"}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=sent).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.post(f"{address}/v1/embeddings", json={**body, "model": "none"}).status_code == 404
        for process in (gateway, worker):
            process.send_signal(signal.SIGTERM)
            process.wait()
    way = found.of(CALLER[3:35])
    parents = {name: span.parent for name, span in way.items()}
    asked, done = way["ask hashing"], way["embed hashing"]
    assert parents == {
        "POST /v1/embeddings": CALLER[36:52],
        "ask hashing": way["POST /v1/embeddings"].id,
        "wait in hashing": asked.id,
        "embed hashing": asked.id,
        "split into tokens": done.id,
        "run the model": done.id,
    }
    assert (asked.service, done.service) == ("front-door", "embedstream-worker")
    assert (done.attributes["embedstream.request_id"], done.attributes["embedstream.texts"]) == ("mine-1", 1)
    assert way["POST /v1/embeddings"].attributes["http.response.status_code"] == 200
    assert not any("a text" in str(span.attributes) for span in found.spans)
    (other,) = [span for span in found.spans if span.trace != CALLER[3:35]]
    assert (other.name, other.parent, other.failed) == ("POST /v1/embeddings", "", False)
    assert other.attributes["http.response.status_code"] == 404


async def test_requests_that_go_together_have_the_worker_in_the_trace_of_each() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)
    queue = Queue()
    gathering = Gathering(queue, 10, traces)

    async def call(text: str) -> None:
        with traces.step("call", "", "server") as step:
            current_trace.set(step.trace)
            await gathering.run(MODEL, request(text))

    calls = []
    for text in ("1", "2", "a", "b", "c"):
        calls.append(asyncio.create_task(call(text)))
        await settle()
    queue.open.set()
    await asyncio.gather(*calls)
    (together,) = [each for each in queue.requests if len(each.texts) == 3]
    with traces.step("embed", together.trace, "consumer"):
        pass
    spans = exporter.get_finished_spans()
    asked = {span.context.span_id: span.context.trace_id for span in spans if span.name == "ask m"}
    done = [span for span in spans if span.name == "embed"]
    assert len({span.context.trace_id for span in done}) == 3
    for span in done:
        assert span.parent is not None
        assert asked[span.parent.span_id] == span.context.trace_id


@pytest.mark.parametrize(
    ("parents", "steps"),
    [("", 0), ("nonsense \x00", 0), (CALLER[:-1] + "0", 0), (CALLER, 1), (f"{CALLER} " * 1000, tracing.MOST_PARENTS)],
    ids=["none", "nonsense", "not-sampled", "one", "many"],
)
def test_a_step_is_recorded_for_those_that_are_traced_alone(parents: str, steps: int) -> None:
    with Traces(TracerProvider()).step("step", parents) as step:
        assert len(step.trace.split()) == steps


def test_without_a_collector_nothing_of_opentelemetry_is_loaded() -> None:
    program = (
        "import sys, embedstream_gateway.app; from embedstream.tracing import open_traces; "
        f"open_traces('s').step('x', '{CALLER}'); print('opentelemetry.exporter' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("env", "missing", "says"),
    [
        ({}, "opentelemetry.sdk.resources", "embedstream[otel]"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "", "http/protobuf"),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "few"}, "", "cannot be set up"),
        ({"OTEL_SDK_DISABLED": "true"}, "", ""),
    ],
    ids=["not-installed", "grpc", "limit", "disabled"],
)
def test_what_keeps_traces_from_being_sent_is_logged_and_stops_nothing(
    env: dict[str, str], missing: str, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with open_traces("s").step("x", "", "server") as step:
        assert not step.trace
    assert says in caplog.text
    assert bool(says) == bool(caplog.records)
