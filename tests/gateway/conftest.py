"""One fleet with a gateway for all tests of it: a Redis server, a worker and `embed-serve`, all of them real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from conftest import serve_redis
from e2e.harness import Fleet, fleet

from embedstream_gateway.api_keys import SCOPES, make_key


@dataclass(frozen=True)
class Served:
    """A gateway with a key for each scope, named after it."""

    url: str
    fleet: Fleet
    keys: dict[str, str]

    def http(self, scope: str | None = "admin") -> httpx.Client:
        """A client with the key of a scope; None: without any."""
        headers = {} if scope is None else {"Authorization": f"Bearer {self.keys[scope]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def openai(self, scope: str = "admin") -> openai.OpenAI:
        """OpenAI's own client, which repeats nothing by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[scope], max_retries=0)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    made = {scope: make_key(scope, [scope]) for scope in SCOPES}
    file = root / "keys.txt"
    file.write_text("# for the tests\n\n" + "\n".join(line for _, line in made.values()))
    with serve_redis() as redis, fleet(redis.url, Path(root)) as running:
        running.start_worker()
        _, url = running.start_gateway("--api-key-file", file, "--files", root / "files", "--output-root", root)
        yield Served(url, running, {scope: secret for scope, (secret, _) in made.items()})
