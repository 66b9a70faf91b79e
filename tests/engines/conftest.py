from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines.model_shapes import docstrings


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache, and nothing is left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """520 real texts, 20 of them beyond MiniLM's 256 tokens, and one-token ones."""
    found = docstrings()
    by_length = sorted(found, key=len)
    usual = by_length[: -100 : -(-len(found) // 500)] + by_length[::7]
    return ["a", "the", "?", *usual[:497], *by_length[-20:]]
