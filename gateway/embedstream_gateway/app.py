"""The application: its routes, its layers, and what becomes of errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import embedstream
from embedstream.api.async_client import AsyncClient
from embedstream.api.client import Client
from embedstream.errors import (
    BrokerError,
    CorpusChanged,
    CorpusDiffers,
    EmbedstreamError,
    JobUnknown,
    OutputError,
    RecordDamaged,
    SpecDiffers,
)
from embedstream.metrics.exposition import QueueCollector
from embedstream.tracing import open_traces
from embedstream_gateway import (
    cohere,
    jobs,
    openai_batches,
    openai_embeddings,
    openai_files,
    page,
    probes,
    refusals,
    tei,
)
from embedstream_gateway.admission import Admission
from embedstream_gateway.api_keys import ApiKeys
from embedstream_gateway.batch_runner import BatchRunner
from embedstream_gateway.bodies import Bodies
from embedstream_gateway.desk import Desk
from embedstream_gateway.fleet import Fleet
from embedstream_gateway.gathering import Gathering
from embedstream_gateway.jobs import MOST_STREAMS
from embedstream_gateway.observing import Observing
from embedstream_gateway.openai_files import MOST_UPLOADS
from embedstream_gateway.refusals import Refusal, bad, unavailable
from embedstream_gateway.services import Services
from embedstream_gateway.store import Store

MOST_THREADS = 64
"""For what blocks: disks, and looks at jobs."""

MOST_READERS = 4
"""Searches, and lists of failed rows: each reads up to a whole output."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a gateway is to work."""

    redis_url: str
    keys: ApiKeys | None
    timeout: float
    """Seconds that a request waits for its worker."""
    files: Path | None = None
    """Where uploaded files and results of batches are kept; None: nowhere."""
    file_days: float = 30.0
    """How long."""
    output_roots: tuple[str, ...] = ()
    """Below which jobs may write and datasets be read."""


def make_app(plan: Plan) -> ASGIApp:
    """The application of one process."""
    traces = open_traces("embedstream-gateway")

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MOST_THREADS, "gateway"))
        store = None if plan.files is None else Store(plan.files, plan.file_days)
        async with AsyncClient(plan.redis_url) as client:
            with Client(plan.redis_url) as blocking, contextlib.ExitStack() as running:
                if store is not None:
                    store.prepare()
                    runner = BatchRunner(store, plan.redis_url)
                    runner.start()
                    running.callback(runner.stop)
                app.state.uploads = asyncio.Semaphore(MOST_UPLOADS)
                app.state.streams = asyncio.Semaphore(MOST_STREAMS)
                app.state.services = Services(
                    client=client,
                    fleet=Fleet(client),
                    gathering=Gathering(client, plan.timeout, traces),
                    jobs=blocking,
                    desk=Desk(plan.redis_url, plan.output_roots),
                    reading=ThreadPoolExecutor(MOST_READERS, "reading"),
                    store=store,
                )
                yield
                await asyncio.to_thread(traces.close)

    # Its own pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="embedstream",
        version=embedstream.__version__,
        description="Embeddings of a fleet of workers, for the clients of OpenAI, TEI, Cohere and Jina.",
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.state.registry = registry = CollectorRegistry()
    registry.register(QueueCollector(plan.redis_url))
    for module in (openai_embeddings, openai_files, openai_batches, tei, cohere, jobs, page, probes):
        app.include_router(module.router)
    app.mount("/page/static", StaticFiles(packages=[("embedstream_gateway", "static")]))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(EmbedstreamError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(Exception, _unexpected)
    return Observing(Admission(Bodies(app), plan.keys), registry, traces)


async def _refused(request: Request, error: Any) -> Response:
    return refusals.answer(error, request.url.path)


async def _failed(request: Request, error: Any) -> Response:
    path = request.url.path
    if isinstance(error, RecordDamaged):
        return refusals.answer(Refusal(HTTPStatus.CONFLICT, str(error), "damaged"), path)
    if isinstance(error, SpecDiffers | CorpusDiffers | CorpusChanged):
        return refusals.answer(Refusal(HTTPStatus.CONFLICT, str(error), "differs"), path)
    if isinstance(error, BrokerError):
        log.warning("request %s: %s", request.state.request_id, error)
        return refusals.answer(unavailable("Redis cannot be used at the moment: try again"), path)
    if isinstance(error, JobUnknown):
        return refusals.answer(Refusal(HTTPStatus.NOT_FOUND, str(error), "not_found"), path)
    if isinstance(error, OutputError):  # of our own folder: where it is and what it lacks is no caller's affair
        log.error("request %s: %s", request.state.request_id, error)
        refusal = Refusal(HTTPStatus.INSUFFICIENT_STORAGE, "the disk of this gateway refuses: see its log", "storage")
        return refusals.answer(refusal, path)
    return refusals.answer(bad(str(error)), path)


async def _invalid(request: Request, error: Any) -> Response:
    """The first thing that is wrong with the body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refusals.answer(bad("the body is no JSON"), request.url.path)
    if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
        return refusals.answer(bad("the body is not read: say Content-Type: application/json"), request.url.path)
    places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
    param = places[0] if places else None
    refusal = bad(f"`{'.'.join(places)}`: {first['msg']}" if places else f"the body: {first['msg']}", param)
    return refusals.answer(refusal, request.url.path)


async def _not_served(request: Request, error: Any) -> Response:
    """An unknown path, another method than it has, or a body that cannot be decoded."""
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return refusals.answer(bad("the body cannot be read: send JSON in UTF-8"), request.url.path)
    message = f"{request.method} {request.url.path} is not served: {error.detail}"
    return refusals.answer(Refusal(HTTPStatus(error.status_code), message, "not_found"), request.url.path)


async def _unexpected(request: Request, error: Any) -> Response:
    """Its traceback goes to the log, by the server; nothing of it to the caller."""
    log.error("request %s failed: %s", request.state.request_id, type(error).__name__)
    refusal = Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"unexpected error, see request {request.state.request_id}")
    return refusals.answer(refusal, request.url.path)
