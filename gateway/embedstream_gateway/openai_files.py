"""OpenAI's files: what batches are made of, and what comes out of them."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import FileResponse, Response

from embedstream_gateway.answers import json, page
from embedstream_gateway.refusals import Refusal, overloaded
from embedstream_gateway.services import services
from embedstream_gateway.store import Store, StoredFile
from embedstream_gateway.uploads import receive

router = APIRouter(prefix="/v1", tags=["OpenAI"])

MOST_UPLOADS = 16
"""At once."""

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "file": {"type": "string", "format": "binary", "description": "JSON lines, a request each."},
                    },
                }
            }
        },
    }
}

Limit = Annotated[int, Query(ge=1, le=10_000)]


class File(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]


@router.post("/files", response_model=File, openapi_extra=_FORM)
async def upload(request: Request) -> Response:
    """Store a file, which is written to the disk as it comes."""
    store = stored(request)
    uploads: asyncio.Semaphore = request.app.state.uploads
    if uploads.locked():
        raise overloaded(f"{MOST_UPLOADS} uploads are under way: try again later")
    async with uploads:
        return json(_shown(await receive(request, store)))


@router.get("/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The files that are there, the newest first."""
    found = await asyncio.to_thread(stored(request).all)
    chosen = [_shown(file) for file in found if purpose in (None, file.purpose)]
    return page(chosen if order == "desc" else chosen[::-1], limit, after)


@router.get("/files/{id}", response_model=File)
async def get_file(id: str, request: Request) -> Response:
    """What is known of a file."""
    return json(_shown(await _find(stored(request), id)))


@router.get("/files/{id}/content", response_class=FileResponse)
async def content(id: str, request: Request) -> Response:
    """The file itself."""
    store = stored(request)
    await _find(store, id)
    return FileResponse(store.content(id), media_type="application/octet-stream")


@router.delete("/files/{id}")
async def delete(id: str, request: Request) -> Response:
    """Remove a file. A batch that was made of it goes on."""
    store = stored(request)
    await _find(store, id)
    await asyncio.to_thread(store.delete, id)
    return json({"id": id, "object": "file", "deleted": True})


def stored(request: Request) -> Store:
    """Where files are. Raises `Refusal` if there is no such place."""
    store = services(request).store
    if store is None:
        raise Refusal(
            HTTPStatus.NOT_IMPLEMENTED, "this gateway keeps no files: start it with --files FOLDER", "no_files"
        )
    return store


async def _find(store: Store, id: str) -> StoredFile:
    file = await asyncio.to_thread(store.get, id)
    if file is None:
        raise Refusal(HTTPStatus.NOT_FOUND, f"no such file: {id}", "not_found", "id")
    return file


def _shown(file: StoredFile) -> dict[str, Any]:
    return {**msgspec.to_builtins(file), "object": "file", "status": "processed"}
