"""The routes of text-embeddings-inference (TEI), with its fields and defaults. Where TEI cuts a text that is too long
without a word, this is an error unless `truncate` is true.

TEI serves one model. Where several are live, the query parameter `model` names one.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

import embedstream
from embedstream.api.interactive import (
    MOST_TEXTS,
    MOST_TOKENIZED_BYTES,
    EmbedRequest,
    make_pairs,
    make_request,
)
from embedstream.chunks import Token
from embedstream_gateway.answers import MOST_INPUTS, json, refuse_cut, refuse_many, shortened
from embedstream_gateway.bodies import MOST_REQUESTS
from embedstream_gateway.fleet import LiveModel
from embedstream_gateway.gathering import Rows
from embedstream_gateway.refusals import Refusal, bad
from embedstream_gateway.services import services

router = APIRouter(tags=["TEI"])

ModelName = Annotated[str | None, Query(description="Which model, if several are live.")]

TOO_LONG = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    truncate: Annotated[bool | None, Field(description="Cut texts that are too long, which is an error else.")] = False
    truncation_direction: Literal["Right", "right", "Left", "left"] = "Right"

    def refuse_cut(self, model: LiveModel, rows: Rows, param: str) -> None:
        """Raise `Refusal` if a text was cut and that is not wanted."""
        if not self.truncate:
            refuse_cut(model, rows, param, "`truncate`", TOO_LONG)

    def check(self) -> None:
        """Raise `Refusal` for what workers do not do."""
        if self.truncate and self.truncation_direction.lower() == "left":
            raise bad("`truncation_direction`: texts are cut at their right end", "truncation_direction")


class EmbedBody(_Body):
    """Of `/embed`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["a text", "another"]}]})

    inputs: str | list[str]
    normalize: bool = Field(True, description="Vectors of length 1.")
    prompt_name: str | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class OutputBody(_Body):
    """Of `/embed_sparse` and `/embed_all`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["a text", "another"]}]})

    inputs: str | list[str]
    prompt_name: str | None = None


class RerankBody(_Body):
    """Of `/rerank`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a question", "texts": ["a text", "another"]}]})

    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="Refused if true: the model's own activation decides.")
    return_text: bool = False


class PredictBody(_Body):
    """Of `/predict`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "a text"}]})

    inputs: str | list[str] | list[list[str]] = Field(description="A text, or `[[text], [text]]`; no pairs.")
    raw_scores: bool = Field(False, description="Refused if true: the model's own activation decides.")


class TokenizeBody(BaseModel):
    """Of `/tokenize`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"inputs": ["a text", "another"]}]})

    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class SimilarityInputs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(_Body):
    prompt_name: str | None = None


class SimilarityBody(BaseModel):
    """Of `/similarity`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"inputs": {"source_sentence": "a text", "sentences": ["another"]}}]},
    )

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class Weight(BaseModel):
    index: int
    value: float


class Rank(BaseModel):
    index: int
    score: float
    text: str | None = None


class SimpleToken(BaseModel):
    id: int
    text: str
    special: bool
    start: Annotated[int | None, Field(description="In bytes of the text, with the prompt before it.")]
    stop: int | None


class Prediction(BaseModel):
    score: float
    label: str


@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedBody, request: Request, model: ModelName = None) -> Response:
    """Vectors of a few texts."""
    body.check()
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    refuse_many(len(texts), "inputs")
    live, rows = await _run(request, model, "dense", make_request(texts, "document", None, body.prompt_name, None))
    body.refuse_cut(live, rows, "inputs")
    vectors = shortened(live, rows, body.dimensions)
    given = live.worker.outputs.get("dense")
    if body.normalize:
        vectors = _normalized(vectors)
    elif given is not None and given.normalized:
        raise bad(f"`normalize` is false: {live.queue} gives vectors of length 1 and no others", "normalize")
    return json(vectors.tolist())


@router.post("/embed_sparse", response_model=list[list[Weight]])
async def embed_sparse(body: OutputBody, request: Request, model: ModelName = None) -> Response:
    """Weights of the vocabulary's tokens for each of a few texts, by a model that gives these."""
    rows = await _output(body, request, model, "sparse")
    return json(
        [
            [
                {"index": index, "value": value}
                for index, value in zip(one.indices.tolist(), one.values.tolist(), strict=True)
            ]
            for one in rows.outputs
        ]
    )


@router.post("/embed_all", response_model=list[list[list[float]]])
async def embed_all(body: OutputBody, request: Request, model: ModelName = None) -> Response:
    """A vector for each token of each of a few texts, by a model that gives these."""
    rows = await _output(body, request, model, "multivector")
    return json([one.tolist() for one in rows.outputs])


@router.post("/rerank", response_model=list[Rank])
async def rerank(body: RerankBody, request: Request, model: ModelName = None) -> Response:
    """How well each text fits the query, the best first."""
    body.check()
    _refuse_raw(body.raw_scores)
    refuse_many(len(body.texts), "texts", MOST_TEXTS)
    live, rows = await _run(request, model, "score", make_pairs(body.query, body.texts, None))
    body.refuse_cut(live, rows, "texts")
    ranks: list[dict[str, Any]] = [{"index": at, "score": score} for at, score in best_first(rows)]
    if body.return_text:
        for rank in ranks:
            rank["text"] = body.texts[rank["index"]]
    return json(ranks)


@router.post("/predict", response_model=list[Prediction] | list[list[Prediction]])
async def predict(body: PredictBody, request: Request, model: ModelName = None) -> Response:
    """The labels of a text, or of each of several, the best first."""
    body.check()
    _refuse_raw(body.raw_scores)
    texts = _texts_of(body.inputs)
    refuse_many(len(texts), "inputs")
    asked = make_request(texts, "document", None, None, None, "classify")
    live, rows = await _run(request, model, "labels", asked)
    body.refuse_cut(live, rows, "inputs")
    found = [
        [
            {"score": score, "label": label}
            for score, label in sorted(zip(scores, rows.labels, strict=True), reverse=True)
        ]
        for scores in rows.numbers.tolist()
    ]
    return json(found[0] if isinstance(body.inputs, str) else found)


@router.post("/similarity", response_model=list[float])
async def similarity(body: SimilarityBody, request: Request, model: ModelName = None) -> Response:
    """The cosine of the angle between a text's vector and each of the others'."""
    parameters = body.parameters or SimilarityParameters()
    parameters.check()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    refuse_many(len(body.inputs.sentences), "sentences", MOST_INPUTS - 1)
    asked = make_request(texts, "document", None, parameters.prompt_name, None)
    live, rows = await _run(request, model, "dense", asked)
    parameters.refuse_cut(live, rows, "inputs")
    vectors = _normalized(rows.numbers)
    return json((vectors[1:] @ vectors[0]).tolist())


@router.post("/tokenize", response_model=list[list[SimpleToken]])
async def tokenize(body: TokenizeBody, request: Request, model: ModelName = None) -> Response:
    """The tokens of each of a few texts, which are not cut."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    refuse_many(len(texts), "inputs")
    asked = make_request(texts, "document", None, body.prompt_name, None, "tokenize")
    asked = msgspec.structs.replace(asked, add_special_tokens=body.add_special_tokens)
    size = sum(len(text.encode()) for text in texts)
    if size > MOST_TOKENIZED_BYTES:
        message = f"`inputs` has {size:,} bytes: at most {MOST_TOKENIZED_BYTES:,} are tokenized at once: send fewer"
        raise Refusal(TOO_LONG, message, param="inputs")
    _, rows = await _run(request, model, "", asked)
    return json([[_simple(token) for token in tokens] for tokens in rows.outputs])


def _simple(token: Token) -> dict[str, object]:
    special = token.start is None
    return {"id": token.id, "text": token.text, "special": special, "start": token.start, "stop": token.stop}


@router.get("/info")
async def info(request: Request, model: ModelName = None) -> dict[str, Any]:
    """What is served, in TEI's words."""
    fleet = services(request).fleet
    live = await fleet.find(model)
    return {
        "model_id": live.worker.model,
        "model_sha": live.worker.fingerprint,
        "model_dtype": live.worker.dtype,
        "model_type": _model_type(live),
        "max_concurrent_requests": MOST_REQUESTS,
        "max_input_length": live.worker.max_length,
        "max_batch_tokens": None,
        "max_batch_requests": None,
        "max_client_batch_size": MOST_INPUTS,
        "auto_truncate": False,
        "tokenization_workers": len(live.workers),
        "version": embedstream.__version__,
        "sha": None,
        "docker_label": None,
    }


def _model_type(model: LiveModel) -> dict[str, dict[str, object]]:
    outputs = model.worker.outputs
    if "score" in outputs or "labels" in outputs:
        return {"reranker" if "score" in outputs else "classifier": {"id2label": {}, "label2id": {}}}
    if "sparse" in outputs and "dense" not in outputs:
        return {"embedding": {"pooling": "splade"}}
    # TEI has a word for three ways of pooling, and clients know no other: mean stands for the rest.
    words = {"cls": "cls", "lasttoken": "last_token"}
    return {"embedding": {"pooling": words.get(model.worker.pooling, "mean")}}


def best_first(rows: Rows) -> list[tuple[int, float]]:
    """Places and scores of pairs; of equal scores the first place first."""
    scores = rows.numbers[:, 0].tolist()
    return sorted(enumerate(scores), key=lambda each: -each[1])


async def _output(body: OutputBody, request: Request, model: str | None, kind: str) -> Rows:
    body.check()
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    refuse_many(len(texts), "inputs")
    asked = make_request(texts, "document", None, body.prompt_name, None, outputs=[kind])
    live, rows = await _run(request, model, kind, asked)
    body.refuse_cut(live, rows, "inputs")
    return rows


async def _run(request: Request, model: str | None, kind: str, asked: EmbedRequest) -> tuple[LiveModel, Rows]:
    serving = services(request)
    live = await serving.fleet.find(model, kind)
    return live, await serving.gathering.run(live, asked)


def _normalized(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors of length 1. Workers give none of length 0."""
    normalized: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalized


def _refuse_raw(raw: bool) -> None:
    if raw:
        raise bad("`raw_scores`: scores come as the model's own settings have them: leave it out", "raw_scores")


def _texts_of(inputs: str | list[str] | list[list[str]]) -> list[str]:
    if isinstance(inputs, str):
        return [inputs]
    rows = [[each] if isinstance(each, str) else each for each in inputs]
    if any(isinstance(each, str) for each in inputs) or any(len(row) != 1 for row in rows):
        raise bad("`inputs`: pairs are not classified: send a text, or [[text], [text]]", "inputs")
    return [row[0] for row in rows]
