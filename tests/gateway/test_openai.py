"""OpenAI's own client against a gateway: embeddings and models."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest
from gateway.conftest import Served
from lab.hashing_reference import reference_vector

TEXTS = ["a text", "another text of some more words", "a text"]


def test_the_client_gets_the_vectors_of_the_model_in_the_order_of_its_texts(served: Served) -> None:
    made = served.openai("embed").embeddings.create(model="hashing", input=TEXTS)
    assert [each.index for each in made.data] == [0, 1, 2]
    for text, each in zip(TEXTS, made.data, strict=True):
        np.testing.assert_allclose(each.embedding, reference_vector(text), atol=1e-6)
    assert made.model == "hashing"
    assert made.usage.prompt_tokens == made.usage.total_tokens > 0


def test_numbers_and_base64_say_the_same(served: Served) -> None:
    client = served.openai()
    numbers = client.embeddings.create(model="hashing", input="a text", encoding_format="float").data[0].embedding
    made = client.embeddings.create(model="hashing", input="a text", encoding_format="base64")
    packed: Any = made.data[0].embedding  # text, which the client's types do not know of
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == numbers


def test_fewer_dimensions_are_the_first_ones_with_length_1_again(served: Served) -> None:
    vector = np.array(
        served.openai().embeddings.create(model="hashing", input="a text", dimensions=8).data[0].embedding
    )
    expected = reference_vector("a text")[:8]
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_more_texts_than_one_request_of_the_queue_takes_come_back_in_order(served: Served) -> None:
    texts = [f"text {number:04}" for number in range(2000)]
    made = served.openai().embeddings.create(model="hashing", input=texts)
    for number in (0, 255, 256, 1023, 1024, 1999):
        np.testing.assert_allclose(made.data[number].embedding, reference_vector(texts[number]), atol=1e-6)
    single = served.openai().embeddings.create(model="hashing", input=texts[:1])
    assert made.usage.prompt_tokens == 2000 * single.usage.prompt_tokens


@pytest.mark.parametrize(
    ("sent", "says", "param"),
    [
        ({"input": [[1, 2, 3]]}, "check_embedding_ctx_length=False", "input"),
        ({"input": [1, 2, 3]}, "check_embedding_ctx_length=False", "input"),
        ({"input": []}, "from 1 to 2,048", "input"),
        ({"input": ["x"] * 2049}, "from 1 to 2,048", "input"),
        ({"input": ["x", ""]}, "empty", "input"),
        ({"input": "x", "dimensions": 385}, "have 384", "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions", "dimensions"),
        ({"input": "x", "extra_body": {"dimension": 8}}, "dimension", "dimension"),
        ({"input": "x", "extra_body": {"encoding_format": "hex"}}, "encoding_format", "encoding_format"),
    ],
    ids=["tokens", "one-text-of-tokens", "none", "many", "empty", "wide", "zero", "unknown-field", "format"],
)
def test_what_cannot_be_embedded_is_refused_with_the_field_at_fault(
    served: Served, sent: dict[str, object], says: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        served.openai().embeddings.create(model="hashing", **sent)  # type: ignore[arg-type]
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param


def test_an_unknown_model_is_not_found_and_no_path_is_looked_up(served: Served) -> None:
    for name in ("text-embedding-3-small", "/etc", "../etc", "~root", "x" * 500):
        with pytest.raises(openai.NotFoundError, match="live: hashing") as refused:
            served.openai().embeddings.create(model=name, input="a text")
        assert refused.value.code == "model_not_found"


def test_models_are_those_with_a_live_worker(served: Served) -> None:
    client = served.openai("embed")
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("hashing", "model")
    assert client.models.retrieve("hashing") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


def test_one_bad_text_costs_only_the_request_that_has_it(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="1,048,576"):
        served.openai().embeddings.create(model="hashing", input=["fine", "x" * (1024 * 1024 + 1)])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 1_000_000,
        b'{"model": "hashing", "input": "\xff"}',
        b'{"model": "hashing", "input": NaN}',
        b"[]",
    ],
    ids=["empty", "cut", "deep", "bytes", "nan", "list"],
)
def test_a_body_that_is_no_request_is_refused_in_one_sentence(served: Served, body: bytes) -> None:
    with served.http("embed") as client:
        refused = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
        untyped = client.post("/v1/embeddings", content=b'{"model": "hashing", "input": "a"}')
        assert untyped.status_code == 400
        assert "application/json" in untyped.json()["error"]["message"]
