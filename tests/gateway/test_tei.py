"""TEI's routes, by its Python client, Hugging Face's and plain HTTP. Scores: `tests/engines/test_gateway.py`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gateway.conftest import Served
from huggingface_hub import InferenceClient
from lab.hashing_reference import reference_vector
from tei_client import HttpClient

LONG = "word " * 20_000
TEXTS = ["a text", "another text"]


def test_tei_client_learns_what_is_served_and_gets_vectors(served: Served) -> None:
    headers = {"Authorization": f"Bearer {served.keys['embed']}"}
    client = HttpClient(served.url, headers=headers)
    assert client.health()
    info = client.info()
    assert info.server_model_id == "hashing"
    assert info.max_input_length
    np.testing.assert_allclose(client.embed(TEXTS), [reference_vector(text) for text in TEXTS], atol=1e-6)


def test_hugging_faces_client_gets_vectors_and_similarities(served: Served) -> None:
    client = InferenceClient(f"{served.url}/embed", token=served.keys["embed"])
    np.testing.assert_allclose(client.feature_extraction("a text"), [reference_vector("a text")], atol=1e-6)
    cut = client.feature_extraction(LONG, normalize=True, truncate=True, truncation_direction="right")
    assert cut.shape == (1, 384)
    compared = InferenceClient(f"{served.url}/similarity", token=served.keys["embed"])
    first, second = compared.sentence_similarity("a text", other_sentences=TEXTS)
    assert first == pytest.approx(1, abs=1e-5)
    expected = float(np.dot(reference_vector("a text"), reference_vector("another text")))
    assert second == pytest.approx(expected, abs=1e-5)


def test_tei_client_gets_the_tokens_of_many_texts(served: Served) -> None:
    client = HttpClient(served.url, headers={"Authorization": f"Bearer {served.keys['embed']}"})
    texts = [f"text {number} 日本" for number in range(300)]
    told = client.tokenize(texts)
    assert [[(token.start, token.stop, token.special) for token in one.tokens] for one in told] == [
        [(start, min(start + 4, len(text.encode())), False) for start in range(0, len(text.encode()), 4)]
        for text in texts
    ]
    assert [token.text for token in told[0].tokens[:2]] == ["text", " 0 \ufffd"]
    assert told[0].tokens[0].id == int.from_bytes(b"text", "little")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": ["fine", LONG]}),
        ("/embed", {"inputs": LONG, "truncate": None}),
        ("/similarity", {"inputs": {"source_sentence": LONG, "sentences": ["fine"]}}),
    ],
    ids=["embed", "null", "similarity"],
)
def test_a_text_that_is_too_long_is_an_error_unless_it_may_be_cut(
    served: Served, path: str, body: dict[str, object]
) -> None:
    with served.http("embed") as client:
        refused = client.post(path, json=body)
        assert refused.status_code == 413
        assert refused.json()["error_type"] == "validation"
        assert "truncate" in refused.json()["error"]


def test_openais_route_does_not_cut_either(served: Served) -> None:
    with served.http("embed") as client:
        body = {"model": "hashing", "input": LONG}
        refused = client.post("/v1/embeddings", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert client.post("/v1/embeddings", json={**body, "truncate": True}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/embed", {"inputs": []}, "from 1 to"),
        ("/embed", {"inputs": "x", "normalize": False}, "length 1"),
        ("/embed", {"inputs": "x", "truncate": True, "truncation_direction": "Left"}, "right end"),
        ("/embed", {"inputs": "x", "prompt_name": "nothing"}, "nothing"),
        ("/embed", {"inputs": "\ud800"}, "surrogate"),
        ("/embed", {"input": "x"}, "inputs"),
        ("/embed", {"inputs": [1, 2]}, "inputs"),
        ("/embed?model=%F0%9F%98%80", {"inputs": "x"}, "no model"),
        ("/rerank", {"query": "q", "texts": ["x"]}, "gives score"),
        ("/rerank?model=hashing", {"query": "q", "texts": ["x"]}, "does not give score"),
        ("/rerank", {"query": "q", "texts": ["x"], "raw_scores": True}, "own settings"),
        ("/predict", {"inputs": ["a", "b"]}, "pairs"),
        ("/predict", {"inputs": [["a", "b"]]}, "pairs"),
        ("/tokenize", {"inputs": LONG * 3}, "262,144"),
        ("/tokenize", {"inputs": "x", "prompt_name": "nothing"}, "nothing"),
    ],
    ids=[
        "none",
        "raw-vectors",
        "left",
        "prompt-name",
        "surrogate",
        "field",
        "tokens",
        "model",
        "no-reranker",
        "other-model",
        "raw-scores",
        "pair",
        "pairs",
        "many-tokens",
        "tokens-prompt",
    ],
)
def test_what_cannot_be_done_is_refused_in_teis_words(
    served: Served, path: str, body: dict[str, object], says: str
) -> None:
    with served.http("embed") as client:
        refused = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert 400 <= refused.status_code < 500 or "no live worker" in refused.text
        assert says in refused.json()["error"]


def test_fewer_dimensions_and_one_text(served: Served) -> None:
    with served.http("embed") as client:
        (vector,) = client.post("/embed?model=hashing", json={"inputs": "a text", "dimensions": 16}).json()
        expected = reference_vector("a text")[:16]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
