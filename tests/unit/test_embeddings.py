"""What a worker answers to a request for several outputs, as arrays; and answers that are none."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from lab.results import EVERY_KIND, some_results

from embedstream.api.embeddings import SparseVector, embeddings
from embedstream.api.interactive import EMBEDDED, EmbedReply, EmbedRequest, make_request
from embedstream.errors import ModelError, RequestError
from embedstream.outputs import OutputSpec
from embedstream_worker import interactive
from embedstream_worker.interactive import reply_outputs

ASKED = [output for output in EVERY_KIND if output.kind in EMBEDDED and output.dtype != "int8"]
RESULTS: Any = some_results([output.kind for output in ASKED], 3)


def request() -> EmbedRequest:
    specs = [OutputSpec(name=each.name, kind=each.kind, dtype=each.dtype) for each in ASKED]
    return make_request(["a", "b", "c"], "document", None, None, None, outputs=specs)


def reply() -> EmbedReply:
    made = EmbedReply(outputs=reply_outputs(ASKED, RESULTS))
    return msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=EmbedReply)


def test_every_output_arrives_as_the_model_gave_it_in_its_dtype() -> None:
    found: Any = embeddings(reply(), request())
    assert list(found) == [output.name for output in ASKED]
    assert {name: rows.dtype.name for name, rows in found.items() if isinstance(rows, np.ndarray)} == {
        "embedding": "float32", "half": "float16", "short": "float32", "bits": "uint8",
    }  # fmt: skip
    np.testing.assert_array_equal(found["embedding"], RESULTS["dense"])
    assert found["short"].shape == (3, 8)
    np.testing.assert_array_equal(found["bits"], np.packbits(RESULTS["dense"] > 0, axis=1))
    sparse, tokens = RESULTS["sparse"], RESULTS["multivector"]
    for row in range(3):
        weights = found["sparse"][row]
        assert isinstance(weights, SparseVector)
        place = slice(*sparse.offsets[row : row + 2])
        np.testing.assert_array_equal(weights.indices, sparse.indices[place])
        np.testing.assert_array_equal(weights.values, sparse.values[place])
        vectors = tokens.values[slice(*tokens.offsets[row : row + 2])]
        np.testing.assert_array_equal(found["multivector"][row], vectors.astype(np.float16))
    found["embedding"][0] = 0  # the caller's own


ODD = {"rows": (b"1234567", b"", b"")}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("embedding", {"rows": (b"", b"", b"")}),
        ("embedding", {"rows": (b"",)}),
        ("embedding", {"name": "another"}),
        ("embedding", {"dtype": "float16"}),
        ("embedding", {"dim": 15}),
        ("embedding", {"dim": 0}),
        ("embedding", ODD),
        ("bits", {"dim": 8}),
        ("sparse", ODD),
        ("sparse", {"dtype": "ubinary"}),
        ("multivector", ODD),
        ("multivector", {"dim": 0}),
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_refused(name: str, change: dict[str, Any]) -> None:
    whole = reply()
    outputs = [msgspec.structs.replace(each, **change) if each.name == name else each for each in whole.outputs]
    with pytest.raises(RequestError, match="upgrade"):
        embeddings(msgspec.structs.replace(whole, outputs=tuple(outputs)), request())


def test_numbers_that_a_dataset_would_not_have_are_an_error_and_so_is_too_long_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = [each for each in ASKED if each.name == "half"]
    far: Any = {"dense": np.array([[0.25] * 16, [70_000] * 16], np.float32)}
    with pytest.raises(ModelError, match="text 1: not_finite: as half: dense in float16"):
        reply_outputs(half, far)
    monkeypatch.setattr(interactive, "MOST_REPLY_BYTES", 100)
    with pytest.raises(ModelError, match="the answer has more than 100 bytes: ask for fewer texts"):
        reply_outputs(ASKED, RESULTS)
