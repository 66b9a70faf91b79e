"""What stands behind a `Client` without Redis: for each model a private server and one worker, on this machine."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid

import redis

from embedstream.api.client import Client
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import EmbedstreamError, ServerError, UsageError
from embedstream.jobs import model_address
from embedstream.lifecycle.opening import make_spec
from embedstream.masking import mask
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream.settings import Settings
from embedstream_producer.embedded import OutputLock
from embedstream_producer.embedded_run import Embedded, check_installed

log = logging.getLogger("embedstream.client")

ALL_FOLDERS = "/"
"""Where the worker may write: it works for this process alone."""

LOOK_SECONDS = 0.05


class EmbeddedFleet:
    """Clients of private servers, each with a worker that serves one model. All end with `close`, or this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held = contextlib.ExitStack()
        self._clients: dict[tuple[str, str | None], tuple[Client, Broker]] = {}
        self._outputs: set[str] = set()

    def close(self) -> None:
        """End workers and servers; what they wrote stays, and the same submissions go on from there."""
        self._clients.clear()
        self._outputs.clear()
        self._held.close()

    def to_write(self, output: str, model: str | None, revision: str | None) -> Client:
        """A client whose worker writes to the output, which is locked until `close`.

        Raises:
            UsageError: the output is no folder, or what a worker needs is not installed.
            OutputBusy: another run has it.
            ServerError: no server can be started.
        """
        place = canonical_output(output)
        if not place.startswith("/"):
            raise UsageError(
                f"output {mask(place)}: without Redis a Client writes into folders alone: name a folder, or give "
                f"redis_url='redis://host:6379/0'"
            )
        client, _ = self._of(model, revision)
        if place not in self._outputs:
            self._held.enter_context(OutputLock(place))
            self._outputs.add(place)
        return client

    def to_embed(self, model: str | None) -> Client:
        """A client whose worker is ready. Raises as `to_write`, and what the worker failed of."""
        client, broker = self._of(model, None)
        while not any(worker.state == "ready" for worker in broker.workers()):
            client.check()
            time.sleep(LOOK_SECONDS)
        return client

    def _of(self, model: str | None, revision: str | None) -> tuple[Client, Broker]:
        key = model_address(model or self._settings.model), revision
        if key not in self._clients:
            check_installed(key[0], "give Client the redis_url of a fleet")
            with contextlib.ExitStack() as held:
                self._clients[key] = self._start(held, *key)
                self._held.push(held.pop_all())
        return self._clients[key]

    def _start(self, held: contextlib.ExitStack, model: str, revision: str | None) -> tuple[Client, Broker]:
        spec = make_spec(
            queue=self._settings.queue, output=ALL_FOLDERS, model=model, revision=revision, parts=(), settings={}
        )
        # Of no output, as there may be many: a place for the logs of this server and worker.
        place = held.enter_context(OutputLock(f"client://{uuid.uuid4().hex}"))
        embedded = held.enter_context(Embedded(spec, place, log.warning))
        if not embedded.url.startswith("unix:"):  # any user of this machine could have the worker write anywhere
            raise ServerError(
                "a Client without Redis needs a server that no other user reaches: install redis or valkey, or "
                "`pip install 'embedstream[embedded]'`, or give redis_url='redis://host:6379/0'"
            )
        client = held.enter_context(Client(embedded.url, spec.queue))
        client.check = embedded.check
        broker = Broker(held.enter_context(connect(embedded.url)), spec.queue)
        done = 0

        def committed() -> int:
            nonlocal done
            with contextlib.suppress(redis.RedisError, EmbedstreamError):
                done = sum(broker.status(job).done for job in broker.active_jobs())
            return done

        embedded.start_worker(committed)
        return client, broker
