"""What every route works with. Nothing of it must survive a restart."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from embedstream.api.async_client import AsyncClient
from embedstream_gateway.fleet import Fleet
from embedstream_gateway.gathering import Gathering


@dataclass(frozen=True)
class Services:
    """Of one process."""

    client: AsyncClient
    fleet: Fleet
    gathering: Gathering


def services(request: Request) -> Services:
    """Those of the application that a request came to."""
    found: Services = request.app.state.services
    return found
