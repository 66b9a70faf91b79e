"""Jobs over HTTP: what `embed-submit --server-side`, `embed-status` and `embed-cancel` can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from http import HTTPStatus
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response, StreamingResponse

from embedstream.api.looks import job_object
from embedstream.errors import EmbedstreamError
from embedstream.jobs import ChunkBy
from embedstream.outputs import Task
from embedstream_gateway.answers import json
from embedstream_gateway.refusals import Refusal, overloaded, unavailable
from embedstream_gateway.services import Services, services

router = APIRouter(tags=["jobs"])

R = TypeVar("R")

MOST_RECORDS = 50_000
"""In one request; its body is bounded as well."""

MOST_ERRORS = 1000
"""Failed rows in one answer."""

MOST_STREAMS = 256
"""Callers that follow jobs at once."""

EVENT_SECONDS = 1.0

LONGEST_STREAM_SECONDS = 3600.0
"""After it a follower connects again, as browsers do by themselves."""

CALL_SECONDS = 60.0
"""For what blocks."""


class JobBody(BaseModel):
    """A job: where its corpus is, and settings of `embed-submit` by their names."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "corpus": ["/data/corpus.jsonl"],
                    "output": "/data/corpus.vectors",
                    "model": "sentence-transformers/all-MiniLM-L6-v2",
                },
                {
                    "records": [{"id": "1", "text": "a text"}],
                    "output": "/data/some.vectors",
                    "model": "sentence-transformers/all-MiniLM-L6-v2",
                },
            ]
        },
    )

    output: Annotated[str, Field(min_length=1, max_length=4096)]
    model: str
    corpus: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Files and s3:// addresses that coordinators read."
    )
    records: Annotated[list[dict[str, Any] | str], Field(min_length=1, max_length=MOST_RECORDS)] | None = Field(
        None, description="The rows themselves."
    )
    revision: str | None = None
    max_errors: str = Field("", description="The job fails if more rows fail: `100` or `0.5%`.")
    format: Literal["jsonl", "json", "csv", "parquet", "arrow"] | None = Field(
        None, description="Of the files of `corpus`; each is recognized by its content else."
    )
    task: Task = "auto"
    outputs: list[str] = Field([], description="As `--emit`: `dense=small:ubinary:256`.")
    role: Literal["document", "query"] = "document"
    prompt: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    id_field: str | None = None
    number_rows: bool = False
    text_field: str | None = None
    title_field: str | None = None
    title_sep: str = " "
    query_field: str | None = None
    keep: list[str] = Field([], description="Fields to carry into the dataset: `NAME` or `NAME:TYPE`.")
    text: bool = Field(True, description="Whether the dataset keeps the texts.")
    empty: Literal["error", "skip"] = "error"
    chunk_tokens: int | None = Field(None, description="Cut texts into chunks of at most so many tokens.")
    chunk_overlap: Annotated[int, Field(ge=0)] = 0
    chunk_by: ChunkBy = "recursive"
    chunk_format: str = Field("", description="What enters the model of a chunk, with `{title}` and `{chunk}`.")
    on_long: Literal["cut", "error", "chunk"] = Field(
        "cut",
        description="A text that is longer than the model takes; `chunk`: cut texts into chunks of what it takes.",
    )

    @model_validator(mode="after")
    def one_source(self) -> JobBody:
        if (self.corpus is None) == (self.records is None):
            raise ValueError("give either `corpus` or `records`")
        return self

    def settings(self) -> dict[str, Any]:
        """As `SpecSettings`."""
        return self.model_dump(exclude={"output", "model", "corpus", "records", "revision", "max_errors"})


@router.post("/jobs", status_code=HTTPStatus.ACCEPTED)
async def create(body: JobBody, request: Request) -> Response:
    """Submit a job. The same one again goes on with it, or finds that it is done."""
    desk = services(request).desk
    job = await submit(body, services(request))
    answer = json(job_object(await blocking(lambda: desk.look(job))))
    answer.status_code = HTTPStatus.ACCEPTED
    answer.headers["Location"] = f"/jobs/{job}"
    return answer


async def submit(body: JobBody, serving: Services) -> str:
    """Submit a job; its id. Raises `Refusal`, `EmbedstreamError`."""
    model = await serving.fleet.find_any(body.model)
    desk, settings = serving.desk, body.settings()
    spec = await blocking(
        lambda: desk.spec(model.queue, model.worker.model, body.output, body.revision, body.corpus, settings)
    )
    if body.corpus is not None:
        await blocking(lambda: desk.hand_over(spec, body.max_errors))
    else:
        await blocking(lambda: desk.push(body.records or [], spec, body.max_errors))
    return spec.job


@router.get("/jobs")
async def list_jobs(request: Request) -> Response:
    """All queues with their jobs and workers, coordinators and mergers: what `embed-status --json` prints."""
    desk = services(request).desk
    return json(await blocking(desk.fleet))


@router.get("/jobs/{id}")
async def get_job(id: str, request: Request) -> Response:
    """One job: what `embed-status JOB --json` prints."""
    desk = services(request).desk
    return json(job_object(await blocking(lambda: desk.look(id))))


@router.delete("/jobs/{id}")
async def cancel(id: str, request: Request) -> Response:
    """End a job early. What is written stays."""
    desk = services(request).desk
    if not await blocking(lambda: desk.cancel(id)):
        raise Refusal(HTTPStatus.CONFLICT, f"job {id} has ended already", "ended")
    return json(job_object(await blocking(lambda: desk.look(id))))


@router.post("/jobs/{id}/retry")
async def retry(id: str, request: Request) -> Response:
    """Go on with a job that was cancelled or failed, if coordinators read its corpus."""
    desk = services(request).desk
    await blocking(lambda: desk.retry(id))
    return json(job_object(await blocking(lambda: desk.look(id))))


@router.get("/jobs/{id}/errors")
async def errors(
    id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_ERRORS)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
) -> Response:
    """The failed rows of an ended job, in the order of the corpus, with their originals."""
    desk, reading = services(request).desk, services(request).reading
    rows = await blocking(lambda: list(islice(desk.errors(id), offset, offset + limit + 1)), reading)
    return json({"errors": rows[:limit], "offset": offset, "has_more": len(rows) > limit})


@router.get(
    "/jobs/{id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "`data:` has what `GET /jobs/ID` answers."}},
)
async def events(id: str, request: Request) -> Response:
    """Follow a job: an event whenever it has changed, the last once it has ended."""
    desk = services(request).desk
    streams: asyncio.Semaphore = request.app.state.streams
    if streams.locked():
        raise overloaded(f"{MOST_STREAMS} callers follow jobs already: ask GET /jobs/{id} now and then")
    first = job_object(await blocking(lambda: desk.look(id)))

    async def follow() -> AsyncIterator[bytes]:
        seen, until = first, time.monotonic() + LONGEST_STREAM_SECONDS
        async with streams:
            yield _event(seen)
            while seen["ended"] is None and time.monotonic() < until:
                await asyncio.sleep(EVENT_SECONDS)
                try:
                    now = job_object(await blocking(lambda: desk.look(id)))
                except (Refusal, EmbedstreamError):
                    return  # the follower asks again, and is told
                if {**now, "now": 0, "seconds": 0} != {**seen, "now": 0, "seconds": 0}:
                    yield _event(now)
                else:
                    yield b":\n\n"  # shows that the gateway lives, and finds whether the follower has left
                seen = now

    return StreamingResponse(follow(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> bytes:
    return b"event: job\ndata: " + msgspec.json.encode(value) + b"\n\n"


async def blocking(act: Callable[[], R], pool: Executor | None = None) -> R:
    """Done in a thread, of `pool` if given. Raises `Refusal` if that takes too long; the thread may still be at it."""
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(pool, act), CALL_SECONDS)
    except TimeoutError:
        raise unavailable(f"not done within {CALL_SECONDS:g} s: try again; the same request goes on") from None
