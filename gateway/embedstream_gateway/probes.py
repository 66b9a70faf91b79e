"""For probes and Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import PlainTextResponse, Response

from embedstream.errors import BrokerError
from embedstream_gateway.refusals import unavailable
from embedstream_gateway.services import services

router = APIRouter(tags=["probes"])


@router.get("/healthz", response_class=PlainTextResponse)
async def alive() -> Response:
    """Whether this process answers."""
    return PlainTextResponse("ok\n")


@router.get("/readyz", response_class=PlainTextResponse)
@router.get("/health", response_class=PlainTextResponse)
async def ready(request: Request) -> Response:
    """Whether Redis can be used, so that requests make sense. As TEI's `/health`, without a word on the model."""
    try:
        await services(request).fleet.models()
    except BrokerError as error:
        raise unavailable("Redis cannot be used at the moment") from error
    return PlainTextResponse("ok\n")


@router.get("/metrics", response_class=PlainTextResponse)
async def exposition(request: Request) -> Response:
    """Metrics of this gateway and of all queues, for Prometheus."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(await asyncio.to_thread(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)
