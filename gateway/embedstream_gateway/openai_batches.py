"""OpenAI's batches, each a job of the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from embedstream.errors import BrokerError, OutputError
from embedstream.server.foreign import leaving_out
from embedstream_gateway.answers import json, page
from embedstream_gateway.batch_lines import ENDPOINT, first_line
from embedstream_gateway.batch_records import BATCH, CANCEL, INPUT, BatchFolder, Cancelled, Made, Progress, shown
from embedstream_gateway.batch_runner import progress
from embedstream_gateway.openai_files import stored
from embedstream_gateway.refusals import Refusal, bad
from embedstream_gateway.services import Services, services
from embedstream_gateway.store import Store, is_id, new_id, write_json

router = APIRouter(prefix="/v1", tags=["OpenAI"])

WINDOW_SECONDS = {"24h": 86_400}

Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]


class BatchBody(BaseModel):
    """What is to be done."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef01234567",
                    "endpoint": ENDPOINT,
                    "completion_window": "24h",
                }
            ]
        },
    )

    input_file_id: str
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"] = Field(description="After it the batch ends, with what is done.")
    metadata: Metadata | None = None


@router.post("/batches")
async def create(body: BatchBody, request: Request) -> Response:
    """Make a batch of an uploaded file."""
    store, serving = stored(request), services(request)
    file = await asyncio.to_thread(store.get, body.input_file_id)
    if file is None or file.purpose != "batch":
        raise bad(f"no file for a batch of this id: {body.input_file_id}", "input_file_id", "file_not_found")
    first = await asyncio.to_thread(first_line, store.content(file.id))
    if first is None:
        raise bad(f"the first line of {file.id} is no request for {ENDPOINT}", "input_file_id", "invalid_file")
    model = await serving.fleet.find(first.body.model, "dense")
    now = int(time.time())
    made = Made(
        id=new_id("batch_"),
        input_file_id=file.id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + WINDOW_SECONDS[body.completion_window],
        metadata=body.metadata,
        model=first.body.model,
        model_address=model.worker.model,
        queue=model.queue,
    )
    await asyncio.to_thread(_make, store, made)
    return json(shown(BatchFolder(store.batches / made.id), made, Progress()))


@router.get("/batches")
async def list_batches(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> Response:
    """Batches, the newest first."""
    store = stored(request)
    found = await asyncio.to_thread(_all, store)
    ids = [made.id for _, made in found]
    start = ids.index(after) + 1 if after in ids else 0
    some = found[start : start + limit + 1]
    serving = services(request)
    return page(await asyncio.to_thread(_looks, serving, some), limit, None)


@router.get("/batches/{id}")
async def get_batch(id: str, request: Request) -> Response:
    """A batch as it stands."""
    folder, made = await _find(stored(request), id)
    return json(await asyncio.to_thread(_look, services(request), folder, made))


@router.post("/batches/{id}/cancel")
async def cancel(id: str, request: Request) -> Response:
    """End a batch; what is done by then is in its files."""
    folder, made = await _find(stored(request), id)
    await asyncio.to_thread(_cancel, folder)
    return json(await asyncio.to_thread(_look, services(request), folder, made))


def _cancel(folder: BatchFolder) -> None:
    if folder.ended() is None and folder.cancelled() is None:
        write_json(folder.path / CANCEL, Cancelled(int(time.time())))


def _make(store: Store, made: Made) -> None:
    """The batch's folder, whole or not there. The input stays, whatever becomes of the uploaded file."""
    folder = store.batches / f".{made.id}.{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        try:
            try:
                os.link(store.content(made.input_file_id), folder / INPUT)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(store.content(made.input_file_id), folder / INPUT)
            write_json(folder / BATCH, made)
            folder.rename(store.batches / made.id)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # not there any more, once it has its name
    except FileNotFoundError as error:
        raise bad("the file has just been deleted", "input_file_id", "file_not_found") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error


def _all(store: Store) -> list[tuple[BatchFolder, Made]]:
    """The newest first. One whose record is damaged is left out, and logged once."""
    found: list[tuple[BatchFolder, Made]] = []
    for id in store.batch_names():
        folder = BatchFolder(store.batches / id)
        with leaving_out(id):
            if (made := folder.made()) is not None:
                found.append((folder, made))
    return sorted(found, key=lambda pair: (-pair[1].created_at, pair[1].id))


async def _find(store: Store, id: str) -> tuple[BatchFolder, Made]:
    if is_id(id, "batch_"):
        folder = BatchFolder(store.batches / id)
        made = await asyncio.to_thread(folder.made)
        if made is not None:
            return folder, made
    raise Refusal(HTTPStatus.NOT_FOUND, f"no such batch: {id}", "not_found", "id")


def _looks(serving: Services, some: list[tuple[BatchFolder, Made]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for folder, made in some:
        with leaving_out(folder.id):
            found.append(_look(serving, folder, made))
    return found


def _look(serving: Services, folder: BatchFolder, made: Made) -> dict[str, Any]:
    done = Progress()
    if folder.ended() is None:
        with contextlib.suppress(BrokerError):  # what is known without Redis is shown
            done = progress(serving.jobs, folder, made)
    return shown(folder, made, done)
