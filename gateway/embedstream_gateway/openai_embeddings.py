"""OpenAI's embeddings and models, for its clients as they are."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from embedstream.api.interactive import make_request
from embedstream_gateway.answers import json, refuse_cut, refuse_many, shortened
from embedstream_gateway.fleet import LiveModel
from embedstream_gateway.refusals import bad
from embedstream_gateway.services import services

router = APIRouter(prefix="/v1", tags=["OpenAI"])

TOKENS_REFUSED = (
    "`input` holds token ids: they are of another vocabulary than the model's, so their vectors would mean nothing: "
    "send strings; with LangChain's OpenAIEmbeddings say check_embedding_ctx_length=False"
)


class EmbeddingsBody(BaseModel):
    """What OpenAI's clients send."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "sentence-transformers/all-MiniLM-L6-v2", "input": ["a text"]}]},
    )

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, or several. Token ids are refused."
    )
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="The first so many of each vector.")
    user: str | None = Field(None, description="Not used.")
    truncate: bool = Field(False, description="Of embedstream: cut texts that are too long, which is an error else.")
    role: Literal["document", "query"] = Field(
        "document", description="Of embedstream: which of the model's prompts stands in front of the texts."
    )


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


@router.post("/embeddings", response_model=Embeddings)
async def create_embeddings(body: EmbeddingsBody, request: Request) -> Response:
    """Vectors of a few texts now, ahead of all jobs."""
    texts = texts_of(body)
    refuse_many(len(texts), "input")
    serving = services(request)
    model = await serving.fleet.find(body.model, "dense")
    rows = await serving.gathering.run(model, make_request(texts, body.role, None, None, None))
    if not body.truncate:
        refuse_cut(model, rows, "input", "`truncate`")
    vectors = shortened(model, rows, body.dimensions)
    tokens = int(rows.tokens.sum())
    return json(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(encoded(vectors, body.encoding_format))
            ],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


@router.get("/models", response_model=Models)
async def list_models(request: Request) -> Response:
    """The models with a live worker."""
    return json({"object": "list", "data": [_shown(model) for model in await services(request).fleet.models()]})


@router.get("/models/{model:path}", response_model=Model)
async def get_model(model: str, request: Request) -> Response:
    """One model with a live worker."""
    return json(_shown(await services(request).fleet.find(model)))


def texts_of(body: EmbeddingsBody) -> list[str]:
    """The texts. Raises `Refusal` for token ids, and for an empty text, as OpenAI does."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    texts = [text for text in inputs if isinstance(text, str)]
    if len(texts) != len(inputs):
        raise bad(TOKENS_REFUSED, "input", "token_ids")
    if "" in texts:
        raise bad("`input` has an empty text", "input")
    return texts


def encoded(vectors: npt.NDArray[np.float32], form: Literal["float", "base64"]) -> list[Any]:
    """Vectors as numbers, or as their bytes (float32 little-endian) in base64."""
    if form == "float":
        return list(vectors.tolist())
    return [base64.b64encode(vector).decode() for vector in vectors.astype("<f4")]


def _shown(model: LiveModel) -> dict[str, Any]:
    return {"id": model.queue, "object": "model", "created": model.started, "owned_by": "embedstream"}
