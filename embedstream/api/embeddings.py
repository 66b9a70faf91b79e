"""What a request for several outputs is answered with, as NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from embedstream.api.interactive import EmbedReply, EmbedRequest, ReplyOutput
from embedstream.errors import RequestError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

_NUMBERS = {"float32": "<f4", "float16": "<f2", "ubinary": "u1"}


class SparseVector(NamedTuple):
    """Weights of the vocabulary's tokens, all above 0."""

    indices: npt.NDArray[Any]
    """Which tokens: uint32, ascending, [n]."""
    values: npt.NDArray[Any]
    """Their weights, [n], in the output's dtype."""


Embeddings: TypeAlias = "dict[str, npt.NDArray[Any] | list[SparseVector] | list[npt.NDArray[Any]]]"
"""By the outputs' names. dense: [texts, dim], or uint8 [texts, dim / 8] for ubinary. sparse: a `SparseVector` for each
text. multivector: for each text its tokens' vectors, [tokens, dim]."""


def embeddings(reply: EmbedReply, request: EmbedRequest) -> Embeddings:
    """The outputs that were asked for.

    Raises:
        RequestError: the worker could not embed the texts, or its answer is none to this request.
    """
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise UsageError("embed() returns NumPy arrays: pip install numpy") from error
    if reply.error:
        raise RequestError(reply.error)
    named = [(output.name, output.kind, output.dtype, len(output.rows)) for output in reply.outputs]
    if named != [(output.name, output.kind, output.dtype, len(request.texts)) for output in request.outputs]:
        raise RequestError("the worker answered with other outputs than those that were asked for: upgrade it")
    try:
        return {output.name: _decoded(output) for output in reply.outputs}
    except ValueError as error:
        raise RequestError(f"the worker's answer cannot be read ({error}): upgrade the older side") from error


def _decoded(output: ReplyOutput) -> Any:
    """Raises `ValueError` for bytes that are none of it."""
    import numpy as np

    numbers = np.dtype(_NUMBERS[output.dtype])
    width = output.dim // 8 if output.dtype == "ubinary" else output.dim
    match output.kind:
        case "dense":
            return np.frombuffer(b"".join(output.rows), numbers).reshape(len(output.rows), width).copy()
        case "multivector":
            return [np.frombuffer(row, numbers).reshape(-1, width).copy() for row in output.rows]
        case _:
            return [_weights(row, numbers) for row in output.rows]


def _weights(row: bytes, numbers: Any) -> SparseVector:
    import numpy as np

    count, rest = divmod(len(row), 4 + numbers.itemsize)
    if rest:
        raise ValueError(f"{len(row)} bytes are no indices and weights")
    return SparseVector(np.frombuffer(row[: 4 * count], "<u4").copy(), np.frombuffer(row[4 * count :], numbers).copy())
