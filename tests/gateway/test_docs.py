"""What `docs/gateway.md` shows in Python does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from e2e.harness import wait_until
from gateway.conftest import Served

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(
    number: int, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    body = {"model": "hashing", "input": "a text"}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
    Path("requests.jsonl").write_text(json.dumps(line))
    code = BLOCKS[number].replace("http://127.0.0.1:8080", served.url).replace('"none"', repr(served.keys["admin"]))
    names: dict[str, object] = {}
    exec(code.replace("sentence-transformers/all-MiniLM-L6-v2", "hashing"), names)
    said = capsys.readouterr().out
    assert said.startswith("hashing\n2 ") or said.strip() in ("validating", "in_progress", "finalizing", "completed")
    if "batch" in names:
        client, id = served.openai(), names["batch"].id  # type: ignore[attr-defined]
        wait_until(lambda: client.batches.retrieve(id).status == "completed", "the batch's end")
