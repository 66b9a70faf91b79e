"""HTTP clients of the gateways: each request, sent again if need be, comes to its answer, and each batch to its end."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from lab.hashing_reference import reference_vector

from chaos.corpora import BLAMED

PATIENCE_SECONDS = 300.0
"""One thing is tried for so long: longer than any fault lasts."""

RETRIED = frozenset((408, 409, 429))
"""Statuses beside those from 500 on which OpenAI's client sends the same request again."""

BATCH_LINES = 300
MODEL = "hashing"
OVER = ("completed", "failed", "cancelled", "expired")


@dataclass
class Seen:
    """What callers met; shared by their threads."""

    answers: Counter[str] = field(default_factory=Counter)
    """Requests and batches that came to their end, and what was sent again, by why."""
    wrong: list[str] = field(default_factory=list)
    blamed: int = 0
    """Lines of batches that became errors because something broke while they were tried alone."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.answers[what] += 1


class Caller:
    """One client, on a thread of its own, from `start` until it has done what it began after `stop`."""

    def __init__(self, urls: Sequence[str], rng: random.Random, seen: Seen, batches: bool) -> None:
        """`batches`: whether it sends these, rather than requests of a few texts."""
        self._urls, self._rng, self.seen = urls, rng, seen
        self._turn = self._batch if batches else self._request
        self._http = httpx.Client(timeout=15)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended in this time."""
        self._thread.join(max(0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever a turn ends with is what the run looks for
                with self.seen.lock:
                    self.seen.wrong.append(f"{type(error).__name__}: {error}")

    def _again(self, send: Callable[[str], httpx.Response]) -> httpx.Response:
        """The answer, from whichever gateway has one. Raises `AssertionError` for one that no client repeats."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            try:
                answer = send(self._rng.choice(self._urls))
            except httpx.HTTPError as error:
                self.seen.count(f"sent again: {type(error).__name__}")
            else:
                if answer.status_code == 200:
                    return answer
                retried = answer.status_code in RETRIED or answer.status_code >= 500
                assert retried, f"{answer.request.url.path} was answered {answer.status_code}: {answer.text}"
                self.seen.count(f"sent again: {answer.status_code}")
            time.sleep(self._rng.uniform(0.05, 0.5))
        raise AssertionError(f"no answer in {PATIENCE_SECONDS:.0f} s")

    def _text(self) -> str:
        return " ".join(f"w{self._rng.randrange(10**6)}" for _ in range(self._rng.randint(1, 40)))

    def _request(self) -> None:
        texts = [self._text() for _ in range(self._rng.choice((1, 1, 2, 20)))]
        body = {"model": MODEL, "input": texts}
        answer = self._again(lambda url: self._http.post(f"{url}/v1/embeddings", json=body)).json()
        assert len(answer["data"]) == len(texts), answer
        for text, data in zip(texts, answer["data"], strict=True):
            assert np.allclose(data["embedding"], reference_vector(text), atol=1e-6), f"not the vector of {text!r}"
        self.seen.count("requests")

    def _batch(self) -> None:
        texts = {f"line-{number}": self._text() for number in range(self._rng.randint(1, BATCH_LINES))}
        content = "".join(
            json.dumps({"custom_id": id, "method": "POST", "url": "/v1/embeddings", "body": _body(text)}) + "\n"
            for id, text in texts.items()
        )
        form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": content.encode()}}
        file = self._again(lambda url: self._http.post(f"{url}/v1/files", **form)).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = self._again(lambda url: self._http.post(f"{url}/v1/batches", json=body)).json()
        until = time.monotonic() + PATIENCE_SECONDS
        while batch["status"] not in OVER:
            assert time.monotonic() < until, f"batch {batch['id']} is {batch['status']}"
            time.sleep(0.3)
            path = f"/v1/batches/{batch['id']}"
            batch = self._again(lambda url, path=path: self._http.get(url + path)).json()  # type: ignore[misc]
        self._judge(batch, texts)
        self.seen.count("batches")

    def _judge(self, batch: dict[str, Any], texts: dict[str, str]) -> None:
        """Each line once, in the output with its vector, or blamed in the error file."""
        done, failed = self._lines(batch["output_file_id"]), self._lines(batch["error_file_id"])
        times = Counter(line["custom_id"] for line in (*done, *failed))
        doubled = [id for id, count in times.items() if count > 1]
        assert not doubled, f"batch {batch['id']}: doubled {doubled[:5]}"
        assert times.keys() == texts.keys(), f"batch {batch['id']}: {len(times)} of {len(texts)} lines: {batch}"
        assert batch["status"] == "completed", f"batch {batch['id']}: {batch['status']}: {batch['errors']}"
        for line in failed:
            error = line["error"] or line["response"]["body"]["error"]
            assert error["code"] in BLAMED, f"batch {batch['id']}: {line}"
        for line in done:
            vector = np.frombuffer(base64.b64decode(line["response"]["body"]["data"][0]["embedding"]), "<f4")
            own = texts[line["custom_id"]]
            assert np.allclose(vector, reference_vector(own), atol=1e-6), (
                f"batch {batch['id']}: not the vector of {own}"
            )
        with self.seen.lock:
            self.seen.blamed += len(failed)

    def _lines(self, file: str | None) -> list[dict[str, Any]]:
        if file is None:
            return []
        answer = self._again(lambda url: self._http.get(f"{url}/v1/files/{file}/content"))
        return [json.loads(line) for line in answer.text.splitlines()]


def _body(text: str) -> dict[str, str]:
    return {"model": MODEL, "input": text, "encoding_format": "base64"}
