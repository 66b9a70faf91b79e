"""The Dockerfile, as far as it can be judged without an engine that builds it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.images import EXEC_FORM, REPOSITORY, Dockerfile, tool

TARGETS = ("producer", "coordinator", "gateway", "worker-cpu", "worker-cuda")
MODEL_LIBRARIES = ("torch", "transformers", "sentence-transformers", "openvino", "onnxruntime")


def required(*extras: str) -> str:
    script = REPOSITORY / "deploy" / "requirements.py"
    done = subprocess.run(
        [sys.executable, str(script), *extras], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout


def requirement_stages(target: str) -> str:
    """Every RUN line that made the environment of a target."""
    lines, stage = [], f"requirements-{target}" if target != "producer" else "requirements"
    dockerfile = Dockerfile()
    while stage in dockerfile.parents:
        lines.append(dockerfile.said(stage, "RUN") or "")
        stage = dockerfile.parents[stage]
    return "\n".join(lines)


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\nCMD embed-worker\n")
    done = subprocess.run([tool("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_user_without_rights_in_exec_form(target: str) -> None:
    dockerfile = Dockerfile()
    user = dockerfile.said(target, "USER")
    assert user is not None
    assert user.split(":")[0].isdigit(), "by number, so that Kubernetes can see that it is not root"
    assert int(user.split(":")[0]) > 0
    for instruction in EXEC_FORM:
        dockerfile.command(target, instruction)
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert dockerfile.command(target, "ENTRYPOINT")[0] in scripts


def test_no_folder_of_an_image_is_writable_for_everybody() -> None:
    modes = re.findall(r"(?:-m|chmod) ?(\d+)", (REPOSITORY / "Dockerfile").read_text())
    assert modes
    assert all(int(mode, 8) & 0o002 == 0 for mode in modes)


@pytest.mark.parametrize("target", TARGETS)
def test_only_workers_have_a_volume_of_models(target: str) -> None:
    assert ("/models" in (Dockerfile().said(target, "VOLUME") or "")) == target.startswith("worker")


@pytest.mark.parametrize("target", ["worker-cpu", "worker-cuda"])
def test_workers_are_healthy_when_they_say_that_they_are_ready(target: str) -> None:
    assert Dockerfile().command(target, "HEALTHCHECK") == ["embed-worker", "--check"]


@pytest.mark.parametrize("target", ["producer", "coordinator", "gateway"])
def test_what_holds_no_model_carries_no_model_library(target: str) -> None:
    runs = requirement_stages(target)
    extras = [extra for extra in ("coordinator", "gateway") if f"requirements.py {extra}" in runs]
    assert extras == [extra for extra in ("coordinator", "gateway") if extra == target]
    assert "torch" not in runs
    names = [line.split(">")[0].split("=")[0].split("[")[0].strip() for line in required(*extras).splitlines()]
    assert not set(names) & set(MODEL_LIBRARIES)
    assert "redis" in names


@pytest.mark.parametrize("target", TARGETS)
def test_every_installation_is_held_to_the_constraints(target: str) -> None:
    installs = [line for line in requirement_stages(target).splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


@pytest.mark.parametrize("target", ["worker-cpu", "worker-cuda"])
def test_workers_get_what_engines_need(target: str) -> None:
    runs = requirement_stages(target)
    assert "TORCH_INDEX_URL" in runs
    assert ("requirements.py worker cpu" in runs) == (target == "worker-cpu")
    assert "torch" in required("worker")
    assert "openvino" in required("cpu")


def test_only_the_gpu_image_has_a_compiler_and_runs_no_more_as_root() -> None:
    dockerfile = Dockerfile()
    assert "gcc libc6-dev" in (dockerfile.said("worker-cuda", "RUN") or "")
    assert dockerfile.said("worker-cuda", "USER") == dockerfile.said("worker-cpu", "USER") == "1000:1000"
    assert "gcc" not in (dockerfile.said("worker-cpu", "RUN") or "")


def test_an_extra_that_is_not_there_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        required("no-such-extra")


def test_everything_that_is_copied_is_let_through_to_the_builder() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for line in (REPOSITORY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source in allowed
                assert (REPOSITORY / source).exists(), source
