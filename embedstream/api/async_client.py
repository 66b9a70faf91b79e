"""The Python API for asyncio. The same steps and plans as `embedstream.api.client`; files are touched in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack

import pyarrow as pa

from embedstream.api import interactive
from embedstream.api.client import (
    FIRST_POLL_SECONDS,
    LAST_POLL_SECONDS,
    find_queue,
    make_request,
    needed_url,
    open_for_records,
    results_of,
    still_open,
    unanswered,
    warn,
    was_cancelled,
)
from embedstream.api.record_blocks import AT_ONCE, RECORDS, Records, records_part
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec, JobState, JobStatus, queue_name
from embedstream.lifecycle.opening import SpecSettings, make_spec
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.lifecycle.watching import look
from embedstream.queue.broker import AsyncBroker, Broker
from embedstream.queue.plans import drive_async
from embedstream.server.connection import REQUEST_TIMEOUT_SECONDS, connect, connect_async, explaining, mask
from embedstream.server.troubles import patiently
from embedstream.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class AsyncJob:
    """One job, by its id. As `Job`, with coroutines."""

    def __init__(
        self,
        id: str,
        broker: AsyncBroker,
        files: Broker,
        url: str,
        settings: Settings,
        sink: Sink | None,
        spec: JobSpec | None = None,
    ) -> None:
        """As `Job`. `files`: a broker for what is done in threads."""
        self.id = id
        self._broker = broker
        self._files = files
        self._url = url
        self._settings = settings
        self._sink = sink
        self._spec = spec

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    @property
    def queue(self) -> str:
        return self._broker.queue

    async def status(self) -> JobStatus:
        """As `Job.status`."""
        with explaining(self._url):
            return await self._broker.status(self.id)

    async def wait(self, timeout: float | None = None) -> JobStatus:
        """As `Job.wait`."""
        end = None if timeout is None else time.monotonic() + timeout
        pause = FIRST_POLL_SECONDS
        while True:
            with explaining(self._url):
                status = await asyncio.to_thread(self._look, end)
            if status.state.ended:
                return status
            left = pause if end is None else end - time.monotonic()
            if left <= 0:
                raise TimeoutError(still_open(status, timeout))
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, LAST_POLL_SECONDS)

    def _look(self, end: float | None) -> JobStatus:
        return patiently(
            lambda: look(self._files, self.id, self._url, self._settings, self._spec),
            warn,
            mask(self._url),
            until=end,
        )

    async def results(self, columns: Iterable[str] | None = None) -> AsyncIterator[pa.RecordBatch]:
        """As `Job.results`."""
        batches = await asyncio.to_thread(results_of, await self.status(), self._sink, columns)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch

    async def cancel(self) -> bool:
        """As `Job.cancel`."""
        with explaining(self._url):
            return was_cancelled(self.id, await self._broker.run(self._broker.cancel(self.id, JobState.CANCELLED)))


class AsyncClient:
    """As `Client`, with coroutines."""

    def __init__(self, redis_url: str | None = None, queue: str | None = None) -> None:
        """As `Client`."""
        self.settings = Settings.from_environment(redis_url=redis_url, queue=queue)
        self.url = needed_url(self.settings)
        self._redis = connect_async(self.url)
        self._requests = connect_async(self.url, retries=0, timeout=REQUEST_TIMEOUT_SECONDS)
        self._files = connect(self.url)

    async def close(self) -> None:
        await self._redis.aclose()
        await self._requests.aclose()
        self._files.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(
        self,
        records: Records | AsyncIterable[Mapping[str, object] | str],
        *,
        output: str,
        model: str | None = None,
        revision: str | None = None,
        max_errors: str = "",
        **settings: Unpack[SpecSettings],
    ) -> AsyncJob:
        """As `Client.submit`. The records are read in a thread; those of an asynchronous iterable, on this loop."""
        if isinstance(records, AsyncIterable):
            records = _drawn(records, asyncio.get_running_loop())
        spec = make_spec(
            queue=self.settings.queue,
            output=output,
            model=model or self.settings.model,
            revision=revision,
            parts=(RECORDS,),
            settings=settings,
        )
        broker, files = AsyncBroker(self._redis, spec.queue), Broker(self._files, spec.queue)
        sink = open_sink(spec.output, spec, self.url)
        with explaining(self.url), DuplicateIndex() as index:
            part = records_part(records, spec, index)
            shown = mask(self.url)
            bound = await asyncio.to_thread(
                patiently, lambda: files.memory_bound(self.settings.queue_bytes), warn, shown
            )
            pushed = Pushed.LOST
            while pushed is Pushed.LOST:
                if not await asyncio.to_thread(
                    patiently, lambda: open_for_records(files, spec, sink, max_errors), warn, shown
                ):
                    break
                pushed = await drive_async(push_job(broker, spec.job, [part], bound), broker, warn, url=shown)
        return AsyncJob(spec.job, broker, files, self.url, self.settings, sink, spec)

    async def job(self, id: str, *, output: str | None = None) -> AsyncJob:
        """As `Client.job`."""
        sink = None if output is None else open_sink(output, queue_url=self.url)
        with explaining(self.url):
            queue = await asyncio.to_thread(find_queue, Broker(self._files, ""), id)
        broker, files = AsyncBroker(self._redis, queue), Broker(self._files, queue)
        return AsyncJob(id, broker, files, self.url, self.settings, sink)

    async def embed(
        self,
        texts: Sequence[str] | str,
        role: Literal["document", "query"] = "query",
        prompt: str | None = None,
        prompt_name: str | None = None,
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """As `Client.embed`."""
        request = make_request(texts, role, prompt, prompt_name, max_length)
        broker = AsyncBroker(self._requests, self.settings.queue or queue_name(model or self.settings.model))
        with explaining(self.url):
            plan = interactive.ask(broker, request, timeout, time.monotonic)
            reply = await drive_async(plan, broker, patience=timeout)
            if reply is None:
                files = Broker(connect(self.url, retries=0, timeout=REQUEST_TIMEOUT_SECONDS), broker.queue)
                raise await asyncio.to_thread(unanswered, files, timeout, model or self.settings.model, self.url)
        return interactive.vectors(reply, len(request.texts))


def _drawn(
    records: AsyncIterable[Mapping[str, object] | str], loop: asyncio.AbstractEventLoop
) -> Iterator[Mapping[str, object] | str]:
    """The records, for a thread beside the loop."""
    stream = aiter(records)

    async def take() -> list[Mapping[str, object] | str]:
        taken: list[Mapping[str, object] | str] = []
        async for record in stream:
            taken.append(record)
            if len(taken) == AT_ONCE:
                break
        return taken

    while batch := asyncio.run_coroutine_threadsafe(take(), loop).result():
        yield from batch
