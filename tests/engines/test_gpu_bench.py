"""The benchmark for GPUs runs to its end where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "gpu.py"


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCH, *map(str, options)], capture_output=True, text=True, check=False)


def test_the_tiny_benchmark_measures_every_path_of_every_model(tmp_path: Path) -> None:
    done = run("--tiny", "--seconds", 0.02, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert {result["model"] for result in results} == {"MiniLM-L6", "BERT-base", "XLM-R-large", "ModernBERT-base"}
    for model in {result["model"] for result in results}:
        paths = {result["path"] for result in results if result["model"] == model}
        assert {"packed", "padded", "encode as it comes"} <= paths
    assert all(result["tokens_per_second"] > 0 and result["flops_per_second"] > 0 for result in results)
    assert all(result["padding"] == 0 for result in results if result["path"] == "packed")
    assert all(result["lowest_cosine"] >= 0.99999 for result in results if "lowest_cosine" in result)
    [whole] = [result for result in results if result["path"] == "end to end"]
    assert whole["rows"] > 100


def test_a_missing_server_is_said_and_the_rest_still_measured(tmp_path: Path) -> None:
    options = (
        "--tiny",
        "--seconds",
        0.02,
        "--models",
        "BERT-base",
        "--redis-server",
        tmp_path / "none",
        "--json",
        tmp_path / "report.json",
    )
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert f"SKIPPED end to end: {tmp_path / 'none'} is no Redis server that runs here" in done.stdout
    assert len(json.loads((tmp_path / "report.json").read_text())["results"]) >= 5
