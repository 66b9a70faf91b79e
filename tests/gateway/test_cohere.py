"""Cohere's own client against a gateway. Reranking: `tests/engines/test_gateway.py`."""

from __future__ import annotations

import base64

import cohere
import numpy as np
import pytest
from cohere.core.api_error import ApiError
from gateway.conftest import Served
from lab.hashing_reference import reference_vector

TEXTS = ["a text", "another text"]


def client_of(served: Served) -> cohere.ClientV2:
    return cohere.ClientV2(api_key=served.keys["embed"], base_url=served.url)


def test_the_client_gets_vectors_in_every_type_it_asks_for(served: Served) -> None:
    made = client_of(served).embed(
        model="hashing",
        input_type="search_document",
        texts=TEXTS,
        embedding_types=["float", "ubinary", "base64"],
    )
    expected = np.array([reference_vector(text) for text in TEXTS])
    found = made.embeddings
    assert found.float_ is not None
    np.testing.assert_allclose(found.float_, expected, atol=1e-6)
    assert found.ubinary == np.packbits(expected > 0, axis=1).tolist()
    assert found.base64 is not None
    decoded = [np.frombuffer(base64.b64decode(each), "<f4") for each in found.base64]
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    assert made.texts == TEXTS


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"texts": ["word " * 20_000]}, "END"),
        ({"texts": ["x"], "output_dimension": 12, "embedding_types": ["ubinary"]}, "multiple of 8"),
        ({"texts": ["x"], "embedding_types": ["int8"]}, "embedding_types"),
        ({"texts": ["x"], "truncate": "START"}, "truncate"),
        ({"texts": []}, "from 1 to"),
    ],
    ids=["long", "bits", "int8", "start", "none"],
)
def test_what_cannot_be_done_is_refused_in_coheres_words(served: Served, sent: dict[str, object], says: str) -> None:
    with pytest.raises(ApiError) as refused:
        client_of(served).embed(model="hashing", input_type="search_query", **sent)  # type: ignore[arg-type]
    assert refused.value.status_code == 400
    assert says in refused.value.body["message"]


def test_a_text_that_is_too_long_is_cut_if_that_is_asked_for(served: Served) -> None:
    texts = ["word " * 20_000]
    made = client_of(served).embed(model="hashing", input_type="search_query", texts=texts, truncate="END")
    assert made.embeddings.float_ is not None
    assert len(made.embeddings.float_[0]) == 384
