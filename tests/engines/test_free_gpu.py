"""Several workers on one machine with several GPUs: each takes one that the fewest others have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from embedstream_worker.engines.free_gpu import take_gpu
from embedstream_worker.engines.torch_device import pick_device

NAMES = ["GPU-a", "GPU-b", "GPU-c"]

TAKE = """
import sys
from pathlib import Path
from embedstream_worker.engines.free_gpu import take_gpu
print(take_gpu(sys.argv[2:], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


class Takers:
    """Processes that take a GPU and keep it until they end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def take(self, *names: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE, str(self._folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())


@pytest.fixture
def takers(tmp_path: Path) -> Iterator[Takers]:
    made = Takers(tmp_path / "devices")
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def test_workers_spread_evenly_and_the_gpu_of_a_killed_one_is_free_again(takers: Takers) -> None:
    assert [takers.take(*NAMES) for _ in range(4)] == [0, 1, 2, 0]
    takers.processes[1].kill()
    takers.processes[1].wait()
    assert takers.take(*NAMES) == 1


def test_gpus_are_told_apart_by_name_whatever_their_number_in_a_process(takers: Takers) -> None:
    assert takers.take("GPU-a", "GPU-b") == 0
    assert takers.take("GPU-a", "GPU-b") == 1
    assert takers.take("GPU-b", "GPU-c") == 1


def test_where_no_file_can_be_locked_it_is_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert take_gpu(NAMES, tmp_path / "file" / "devices") == 0
    assert "--device cuda:N" in caplog.text


def test_one_gpu_is_taken_without_a_trace(tmp_path: Path) -> None:
    assert take_gpu(["GPU-a"], tmp_path / "devices") == 0
    assert not list(tmp_path.iterdir())


def test_auto_takes_a_gpu_that_no_other_worker_has(
    takers: Takers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=NAMES[i]))
    assert takers.take(*NAMES) == 0
    assert str(pick_device("auto")) == "cuda:1"
    assert str(pick_device("cuda:0")) == "cuda:0"
