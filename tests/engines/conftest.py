from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines.embedding import MINILM
from engines.model_shapes import Shape, docstrings

from embedstream_worker.models import resolve_model


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """220 real texts, 20 of them beyond MiniLM's 256 tokens, and one-token ones."""
    found = docstrings()
    by_length = sorted(found, key=len)
    usual = by_length[: -100 : -(-len(found) // 200)] + by_length[::7]
    return ["a", "the", "?", *usual[:197], *by_length[-20:]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[[Shape], Path]:
    """Makes a model folder of a shape, once."""
    made: dict[Shape, Path] = {}

    def make(shape: Shape) -> Path:
        if shape not in made:
            made[shape] = shape(tmp_path_factory.mktemp("shape"), resolve_model(MINILM).path, texts)
        return made[shape]

    return make
