"""What every route works with. Nothing of it must survive a restart."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.requests import Request

from embedstream.api.async_client import AsyncClient
from embedstream.api.client import Client
from embedstream_gateway.desk import Desk
from embedstream_gateway.fleet import Fleet
from embedstream_gateway.gathering import Gathering
from embedstream_gateway.store import Store


@dataclass(frozen=True)
class Services:
    """Of one process."""

    client: AsyncClient
    fleet: Fleet
    gathering: Gathering
    jobs: Client
    """For what blocks: call it in threads."""
    desk: Desk
    reading: Executor
    """For what reads whole outputs, which may take minutes: no other request waits for its few threads."""
    store: Store | None
    """Files and batches; None: this gateway keeps none."""


def services(request: Request) -> Services:
    """Those of the application that a request came to."""
    found: Services = request.app.state.services
    return found
