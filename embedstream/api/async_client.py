"""The Python API for asyncio. Requests run on the event loop; all else is done by `Client` and `Job`, in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar, Unpack, overload

import pyarrow as pa

from embedstream.api import interactive
from embedstream.api.client import Client, needed_url
from embedstream.api.embeddings import Embeddings, embeddings
from embedstream.api.interactive import EmbedReply, EmbedRequest, make_pairs, make_request
from embedstream.api.job import Job, Waiting, checked, warn
from embedstream.api.record_blocks import AT_ONCE, Records
from embedstream.dataset.schema import ErrorRow
from embedstream.jobs import JobStatus
from embedstream.lifecycle.opening import SpecSettings
from embedstream.outputs import OutputSpec
from embedstream.queue.broker import AsyncBroker
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import connect_async, explaining
from embedstream.server.patience import Patience, Stopped
from embedstream.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

R = TypeVar("R")


class AsyncJob:
    """One job, by its id. As `Job`, with coroutines."""

    def __init__(self, job: Job, url: str) -> None:
        """`url`: of Redis."""
        self._job = job
        self._url = url

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def queue(self) -> str:
        return self._job.queue

    async def status(self) -> JobStatus:
        """As `Job.status`."""
        return await asyncio.to_thread(self._job.status)

    async def wait(
        self,
        timeout: float | None = None,
        *,
        check: bool = True,
        progress: Callable[[JobStatus], object] | None = None,
    ) -> JobStatus:
        """As `Job.wait`. Between two looks no thread waits."""
        waiting = Waiting(timeout)
        while not (status := await _patiently(self._job.look, self._url, waiting.end)).state.ended:
            if progress is not None:
                progress(status)
            await asyncio.sleep(waiting.pause(status))
        return checked(status) if check else status

    async def errors(self) -> list[ErrorRow]:
        """As `Job.errors`, all at once."""
        return await asyncio.to_thread(lambda: list(self._job.errors()))

    async def results(self, columns: Iterable[str] | None = None) -> AsyncIterator[pa.RecordBatch]:
        """As `Job.results`."""
        batches = await asyncio.to_thread(self._job.results, columns)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch

    async def cancel(self) -> bool:
        """As `Job.cancel`."""
        return await asyncio.to_thread(self._job.cancel)


class AsyncClient:
    """As `Client`, with coroutines."""

    def __init__(self, redis_url: str | None = None, queue: str | None = None) -> None:
        """As `Client`, but Redis must be named. Raises `UsageError` if it is not."""
        self._client = Client(needed_url(Settings.from_environment(redis_url=redis_url)), queue)
        self.settings, self.url = self._client.settings, self._client.url
        self._requests = connect_async(self.url)

    async def close(self) -> None:
        await self._requests.aclose()
        self._client.close()

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
        trust_unchanged: bool = False,
        **settings: Unpack[SpecSettings],
    ) -> AsyncJob:
        """As `Client.submit`. The records are read in a thread; those of an asynchronous iterable, on this loop.

        A submission that is cancelled stops before its next block; the same one goes on from there.
        """
        stream = _drawn(records, asyncio.get_running_loop()) if isinstance(records, AsyncIterable) else records
        spec = await asyncio.to_thread(self._client.make_spec, output, model, revision, settings)
        job = await _patiently(
            lambda patience: self._client.push(stream, spec, max_errors, patience, trust_unchanged=trust_unchanged),
            self.url,
        )
        return AsyncJob(job, self.url)

    async def job(self, id: str, *, output: str | None = None) -> AsyncJob:
        """As `Client.job`."""
        return AsyncJob(await asyncio.to_thread(self._client.job, id, output=output), self.url)

    @overload
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
        outputs: None = None,
    ) -> npt.NDArray[np.float32]: ...

    @overload
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
        outputs: Sequence[OutputSpec | str],
    ) -> Embeddings: ...

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
        outputs: Sequence[OutputSpec | str] | None = None,
    ) -> npt.NDArray[np.float32] | Embeddings:
        """As `Client.embed`."""
        request = make_request(texts, role, prompt, prompt_name, max_length, outputs=outputs)
        reply = await self._asked(request, timeout, model)
        return interactive.vectors(reply, len(request.texts)) if outputs is None else embeddings(reply, request)

    async def rerank(
        self,
        query: str,
        texts: Sequence[str],
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> list[float]:
        """As `Client.rerank`."""
        request = make_pairs(query, texts, max_length)
        return interactive.scores(await self._asked(request, timeout, model), len(request.texts))

    async def classify(
        self,
        texts: Sequence[str] | str,
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> list[tuple[str, float]]:
        """As `Client.classify`."""
        request = make_request(texts, "document", None, None, max_length, "classify")
        return interactive.labels(await self._asked(request, timeout, model), len(request.texts))

    async def ask(self, request: EmbedRequest, queue: str, timeout: float) -> EmbedReply | None:
        """The reply of any worker of a queue, as it is, which may be an error; None if none came in time.

        Raises:
            UsageError: more than a request may ask.
            BrokerError: Redis could not be used in this time, or refuses.
        """
        with explaining(self.url):
            return await interactive.ask_on_loop(AsyncBroker(self._requests, queue), request, timeout)

    async def workers(self) -> dict[str, list[WorkerRecord]]:
        """As `Client.workers`."""
        return await asyncio.to_thread(self._client.workers)

    async def _asked(self, request: EmbedRequest, timeout: float, model: str | None) -> EmbedReply:
        reply = await self.ask(request, self._client.queue_of(model), timeout)
        if reply is None:
            raise await asyncio.to_thread(self._client.unanswered, timeout, model)
        return reply


async def _patiently(act: Callable[[Patience], R], url: str, until: float | None = None) -> R:
    """Do it in a thread of its own, as the loop's few are not for what may wait for hours. The thread ends soon after
    this was cancelled.
    """
    stopping, thread = threading.Event(), ThreadPoolExecutor(1, "embedstream")

    def tick() -> None:
        if stopping.is_set():
            raise Stopped

    patience = Patience(warn, url, until=until, wait=stopping.wait, tick=tick)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, act, patience)
    finally:
        stopping.set()
        thread.shutdown(wait=False)


def _drawn(
    records: AsyncIterable[Mapping[str, object] | str], loop: asyncio.AbstractEventLoop
) -> Iterator[Mapping[str, object] | str]:
    """The records, for a thread next to the loop."""
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
