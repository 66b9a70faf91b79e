"""Results as HTTP: JSON by msgspec, as FastAPI's own way goes through every number of every vector."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from embedstream.api.interactive import MOST_TEXTS
from embedstream.dataset.values import cut
from embedstream.outputs import NAMES, Output
from embedstream_gateway.fleet import LiveModel
from embedstream_gateway.gathering import Rows
from embedstream_gateway.refusals import Refusal, bad

MOST_INPUTS = 2 * MOST_TEXTS
"""Texts of one request, as OpenAI takes them."""

_encode = msgspec.json.Encoder().encode


def json(value: Any) -> Response:
    """A value as JSON."""
    return Response(_encode(value), media_type="application/json")


def refuse_many(count: int, param: str, most: int = MOST_INPUTS) -> None:
    """Raise `Refusal` for no input, or more than a request may have."""
    if not 1 <= count <= most:
        raise bad(f"`{param}` has {count:,} texts: from 1 to {most:,} are embedded at once, more as a batch", param)


def shortened(model: LiveModel, rows: Rows, dimensions: int | None) -> npt.NDArray[np.float32]:
    """Vectors [n, dimensions], of length 1 again if the model normalizes. Raises `Refusal`."""
    vectors = rows.numbers
    dim = vectors.shape[1]
    if dimensions is None or dimensions == dim:
        return vectors
    if dimensions > dim:
        raise bad(f"`dimensions` is {dimensions:,}: the vectors of {model.queue} have {dim:,}", "dimensions")
    given = model.worker.outputs.get("dense")
    output = Output(
        name=NAMES["dense"],
        kind="dense",
        dtype="float32",
        dim=dimensions,
        normalized=given is not None and given.normalized,
    )
    return cut(vectors, output)


def refuse_cut(
    model: LiveModel, rows: Rows, param: str, way_out: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST
) -> None:
    """Raise `Refusal` if a text was cut. `way_out`: how the caller may allow that."""
    if not rows.cut:
        return
    others = f" (and {len(rows.cut) - 1:,} more)" if len(rows.cut) > 1 else ""
    raise Refusal(
        status,
        f"text {rows.cut[0]}{others} of `{param}` is longer than the {model.worker.max_length:,} tokens that "
        f"{model.queue} takes: shorten it, or allow it to be cut with {way_out}",
        "context_length_exceeded",
        param,
    )


def page(items: list[dict[str, Any]], limit: int, after: str | None) -> Response:
    """Some of a list as OpenAI's clients leaf through it; `after`: the id of the last that they have."""
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    some = items[start : start + limit]
    return json(
        {
            "object": "list",
            "data": some,
            "first_id": some[0]["id"] if some else None,
            "last_id": some[-1]["id"] if some else None,
            "has_more": start + limit < len(items),
        }
    )
