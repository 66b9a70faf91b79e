"""A start that was there before: what it found is used again, for the same model on the same machine alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from embedstream_worker import earlier_starts
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.probe import Trial

INFO = HashingEngine().info


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path))
    return tmp_path / "starts"


def test_what_a_start_found_is_known_to_the_next_of_the_same_model_alone() -> None:
    assert earlier_starts.recall(INFO) is None
    earlier_starts.remember(INFO, Trial(1024, 5000.0))
    assert earlier_starts.recall(INFO) == Trial(1024, 5000.0)
    replace = dataclasses.replace
    others: list[dict[str, Any]] = [
        {"fingerprint": "f" * 32}, {"engine": "torch"}, {"dtype": "bfloat16"}, {"batch_tokens": 100},
    ]  # fmt: skip
    for other in (replace(INFO, **changed) for changed in others):
        assert earlier_starts.recall(other) is None


def test_another_number_of_cores_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_starts.remember(INFO, Trial(1024, 5000.0))
    monkeypatch.setattr(earlier_starts, "cpu_cores", lambda: 999)
    assert earlier_starts.recall(INFO) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[0, 1.0]", b'["a", 1]', b"[1024, -1.0]", b"[1024, 1.0, 3, 4"])
def test_what_is_damaged_is_not_known(content: bytes, folder: Path) -> None:
    earlier_starts.remember(INFO, Trial(1024, 5000.0))
    (kept,) = folder.iterdir()
    kept.write_bytes(content)
    assert earlier_starts.recall(INFO) is None


def test_a_machine_that_can_keep_nothing_starts_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "file"))
    earlier_starts.remember(INFO, Trial(1024, 5000.0))
    assert earlier_starts.recall(INFO) is None
