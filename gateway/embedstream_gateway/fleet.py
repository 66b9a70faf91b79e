"""Which models live workers serve, looked at again every second or so."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from http import HTTPStatus

from embedstream.api.async_client import AsyncClient
from embedstream.queue.workers import WorkerRecord
from embedstream_gateway.refusals import Refusal, bad, unavailable

LOOK_SECONDS = 1.0
"""How old a look may be: half a worker's heartbeat."""

LONGEST_NAME = 512


@dataclass(frozen=True)
class LiveModel:
    """A queue, and the workers on it that take requests."""

    queue: str
    workers: tuple[WorkerRecord, ...]

    @property
    def worker(self) -> WorkerRecord:
        """The first, which speaks for all: a queue is one model."""
        return self.workers[0]

    @property
    def started(self) -> int:
        return int(min(worker.started for worker in self.workers))

    def gives(self, kind: str) -> bool:
        """Whether requests for this kind can be answered. Workers of an earlier version do not tell; they decide."""
        return not kind or not self.worker.outputs or kind in self.worker.outputs


class Fleet:
    """Models by the names that clients may use: the queue's and the model's own."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._seen: dict[str, list[WorkerRecord]] = {}
        self._models: list[LiveModel] = []
        self._looked = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def models(self) -> list[LiveModel]:
        """Those with a ready worker. Raises `BrokerError`."""
        await self._look()
        return self._models

    async def find(self, name: str | None, kind: str = "") -> LiveModel:
        """The model of this name; None: the only one that gives this kind. `kind`: empty for any.

        Raises:
            Refusal: there is none, or no worker of it is ready.
            BrokerError: Redis cannot be used.
        """
        models = await self.models()
        if not any(self._seen.values()):
            # As in a Redis that was emptied: workers say within seconds that they are there.
            raise unavailable("no worker is known: start one with embed-worker, or try again")
        if name is None:
            return self._only(models, kind)
        if len(name) > LONGEST_NAME:
            raise bad(f"the model's name has {len(name):,} characters", "model")
        for model in models:
            if name in (model.queue, model.worker.model):
                if not model.gives(kind):
                    given = ", ".join(model.worker.outputs)
                    raise bad(f"model {name} does not give {kind}: it gives {given}", "model")
                return model
        waiting = [queue for queue, workers in self._seen.items() if name in (queue, *(w.model for w in workers))]
        if waiting:
            raise unavailable(f"model {name} is known, and no worker of it is ready: start one with embed-worker")
        live = ", ".join(model.queue for model in models) or "none"
        raise Refusal(
            HTTPStatus.NOT_FOUND, f"there is no model {name} (live: {live}): GET /v1/models", "model_not_found", "model"
        )

    async def find_any(self, name: str) -> LiveModel:
        """The model of this name, also if its workers are only starting. Raises as `find`."""
        await self._look()
        for queue, workers in self._seen.items():
            if workers and name in (queue, *(worker.model for worker in workers)):
                return LiveModel(queue, tuple(workers))
        return await self.find(name)

    def _only(self, models: list[LiveModel], kind: str) -> LiveModel:
        fitting = [model for model in models if model.gives(kind)]
        if not fitting:
            raise unavailable(f"no live worker gives {kind or 'anything'}: start one with embed-worker")
        if len(fitting) > 1:
            raise bad(f"several models are live: name one as `model`: {', '.join(m.queue for m in fitting)}", "model")
        return fitting[0]

    async def _look(self) -> None:
        """One look for all that need one, its failure too: behind a Redis that hangs they would wait one by one."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._refresh())
            await asyncio.shield(self._looking)

    async def _refresh(self) -> None:
        self._seen = await self._client.workers()
        self._models = [LiveModel(queue, ready) for queue, ready in map(_ready, self._seen.items()) if ready]
        self._looked = time.monotonic()


def _ready(seen: tuple[str, list[WorkerRecord]]) -> tuple[str, tuple[WorkerRecord, ...]]:
    """A queue, and its workers that take requests."""
    queue, workers = seen
    return queue, tuple(worker for worker in workers if worker.state == "ready")
