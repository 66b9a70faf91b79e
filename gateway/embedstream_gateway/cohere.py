"""Cohere's `embed` and `rerank`, and Jina's `rerank`, for their clients as they are."""

from __future__ import annotations

import base64
import secrets
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from embedstream.api.interactive import MOST_TEXTS, make_pairs, make_request
from embedstream_gateway.answers import json, refuse_cut, refuse_many, shortened
from embedstream_gateway.gathering import Rows
from embedstream_gateway.refusals import bad
from embedstream_gateway.services import services
from embedstream_gateway.tei import best_first

router = APIRouter(tags=["Cohere, Jina"])

EmbeddingType = Literal["float", "base64", "ubinary"]


class EmbedBody(BaseModel):
    """Of `/v2/embed`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "sentence-transformers/all-MiniLM-L6-v2",
                    "input_type": "search_query",
                    "texts": ["a text"],
                    "embedding_types": ["float"],
                }
            ]
        },
    )

    model: str
    input_type: Literal["search_document", "search_query", "classification", "clustering"]
    texts: list[str]
    embedding_types: list[EmbeddingType] = Field(["float"], description="ubinary: a bit a dimension, 1 above 0.")
    output_dimension: Annotated[int, Field(ge=1)] | None = None
    truncate: Literal["NONE", "END"] = Field("NONE", description="END: cut texts that are too long.")


class Document(BaseModel):
    text: str


class RerankBody(BaseModel):
    """Of `/v2/rerank` and `/v1/rerank`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": "a/reranker", "query": "a question", "documents": ["a text", "another"], "top_n": 1}]
        },
    )

    model: str
    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Cut a pair of query and document to so many tokens; a longer one is an error else."
    )


@router.post("/v2/embed")
async def embed(body: EmbedBody, request: Request) -> Response:
    """Vectors of a few texts, of queries if `input_type` is search_query, else of documents."""
    refuse_many(len(body.texts), "texts")
    serving = services(request)
    model = await serving.fleet.find(body.model, "dense")
    role: Literal["document", "query"] = "query" if body.input_type == "search_query" else "document"
    rows = await serving.gathering.run(model, make_request(body.texts, role, None, None, None))
    if body.truncate == "NONE":
        refuse_cut(model, rows, "texts", "`truncate`: END")
    vectors = shortened(model, rows, body.output_dimension)
    return json(
        {
            "id": secrets.token_hex(16),
            "embeddings": {kind: _encoded(vectors, kind) for kind in dict.fromkeys(body.embedding_types)},
            "texts": body.texts,
            "meta": _meta(rows),
            "response_type": "embeddings_by_type",
        }
    )


@router.post("/v2/rerank")
@router.post("/v1/rerank")
async def rerank(body: RerankBody, request: Request) -> Response:
    """How well each document fits the query, the best first."""
    refuse_many(len(body.documents), "documents", MOST_TEXTS)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    serving = services(request)
    model = await serving.fleet.find(body.model, "score")
    most = body.max_tokens_per_doc and min(body.max_tokens_per_doc, model.worker.max_length or body.max_tokens_per_doc)
    rows = await serving.gathering.run(model, make_pairs(body.query, texts, most))
    if body.max_tokens_per_doc is None:
        refuse_cut(model, rows, "documents", "`max_tokens_per_doc`")
    results: list[dict[str, Any]] = [
        {"index": at, "relevance_score": score} for at, score in best_first(rows)[: body.top_n]
    ]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    tokens = int(rows.tokens.sum())
    return json(
        {
            "id": secrets.token_hex(16),
            "model": body.model,
            "results": results,
            "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
            "meta": _meta(rows),
        }
    )


def _meta(rows: Rows) -> dict[str, Any]:
    return {"api_version": {"version": "2"}, "billed_units": {"input_tokens": int(rows.tokens.sum())}}


def _encoded(vectors: npt.NDArray[np.float32], kind: EmbeddingType) -> list[Any]:
    if kind == "float":
        return list(vectors.tolist())
    if kind == "base64":
        return [base64.b64encode(vector).decode() for vector in vectors.astype("<f4")]
    if vectors.shape[1] % 8:
        raise bad("`embedding_types`: ubinary packs 8 dimensions into a byte: use a multiple of 8", "embedding_types")
    return list(np.packbits(vectors > 0, axis=1).tolist())
