"""Cores and memory are what a container may take of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedstream import machine

GIB = 1 << 30


def grouped(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str]) -> None:
    """On a machine of 8 cores and 64 GiB, in these control groups."""
    for name, content in {"self/cgroup": groups, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.setattr(machine, "_PROC", folder)
    monkeypatch.setattr(machine, "_CGROUPS", folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/../..\n", {"cpu.max": "200000 100000\n"}, 2),
        ("4:cpu,cpuacct:/docker/x\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:memory:/\n", {"cpu.max": "damaged"}, 8),
        ("no groups", {}, 8),
    ],
)
def test_openvino_37838_threads_are_as_many_as_a_containers_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    grouped(tmp_path, monkeypatch, groups, files)
    assert machine.cpu_cores() == cores


@pytest.mark.parametrize(
    ("groups", "files", "gib"),
    [
        ("0::/\n", {"memory.max": f"{GIB}\n"}, 1),
        ("0::/\n", {"memory.max": "max\n"}, 64),
        ("0::/\n", {"memory.max": f"{128 * GIB}\n"}, 64),
        ("0::/a/b\n", {"a/memory.max": f"{3 * GIB}\n", "a/b/memory.max": "max\n"}, 3),
        ("0::/../..\n", {"memory.max": f"{2 * GIB}\n"}, 2),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64),
        ("4:cpu:/\n0::/\n", {"memory.max": "damaged"}, 64),
        ("no groups", {}, 64),
    ],
)
def test_memory_is_as_much_as_a_container_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], gib: int
) -> None:
    grouped(tmp_path, monkeypatch, groups, files)
    assert machine.memory_bytes() == gib * GIB
