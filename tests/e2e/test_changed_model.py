"""Is it still this model? A finished output is compared with the files of the folder that the same command names."""

from __future__ import annotations

import os
from pathlib import Path

from engines.embedding import MINILM
from engines.kinds import classifier

from e2e.harness import run, write_corpus
from embedstream_worker.models import resolve_model


def test_a_model_whose_weights_changed_in_place_is_told_of_a_finished_output(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = classifier(tmp_path / "model", resolve_model(MINILM).path, [])
    write_corpus(tmp_path / "c.jsonl", 5)
    arguments = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", model, "--no-warmup"]
    assert run("embed-submit", *arguments).returncode == 0
    again = run("embed-submit", *arguments)
    assert (again.returncode, "finished already" in again.stdout) == (0, True), again.stdout
    weights = model / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = run("embed-submit", *arguments)
    assert refused.returncode == 2
    assert f"files of model {model} have changed since" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run("embed-submit", *arguments, "--trust-unchanged").returncode == 0
