"""Redis and workers that come and go: every request ends with an answer, or with an error that clients repeat."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import openai
from e2e.harness import fleet, wait_until
from lab.hashing_reference import reference_vector
from lab.redis_servers import own_server
from lab_engines import faulty


def test_requests_go_on_once_redis_and_a_worker_are_back(tmp_path: Path) -> None:
    with own_server() as server, fleet(server.url, tmp_path) as running:
        worker = running.start_worker()
        _, url = running.start_gateway("--timeout", "5")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client.embeddings.create(model="hashing", input="a text")

        server.kill()
        wait_until(lambda: httpx.get(f"{url}/health").status_code != 200, "the gateway misses Redis")
        for answer in (httpx.get(f"{url}/health"), embed(url)):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert "Redis" in answer.text
            assert server.url not in answer.text
        assert httpx.get(f"{url}/healthz").status_code == 200

        server.start()
        worker.kill()
        worker.wait()
        running.start_worker()
        wait_until(lambda: embed(url).status_code == 200, "an answer of the new worker")
        # The name of the dead worker is there for some seconds; what the client repeats is answered.
        patient = client.with_options(max_retries=5)
        vector = patient.embeddings.create(model="hashing", input="another").data[0].embedding
        np.testing.assert_allclose(vector, reference_vector("another"), atol=1e-6)


def embed(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"model": "hashing", "input": "a text"}, timeout=30)


def test_what_fails_in_a_worker_is_in_its_log_by_the_callers_id(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    with own_server() as server, fleet(server.url, tmp_path) as running:
        running.start_worker(**faulty(tmp_path / "faults"))
        _, url = running.start_gateway()
        body = {"model": "hashing", "input": "[[fault:tokenize-raise]]"}
        failed = httpx.post(f"{url}/v1/embeddings", json=body, headers={"X-Request-Id": "mine-42"}, timeout=30)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "worker_failed")
        assert failed.headers["X-Request-Id"] == "mine-42"
        log = (tmp_path / "worker-0.log").read_text()
        assert "request mine-42 could not be embedded" in log
        assert embed(url).status_code == 200
