"""What the Dockerfile says of each target, and the compose file as compose itself understands it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

EXEC_FORM = ("ENTRYPOINT", "CMD", "HEALTHCHECK")


def tool(name: str) -> str:
    """A program of the test's environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install -c constraints.txt -e '.[dev]'"
    return found


def compose(*arguments: str, env_file: Path) -> subprocess.CompletedProcess[str]:
    """docker-compose over the project's file, with nothing of the tester's own environment."""
    return subprocess.run(
        [tool("docker-compose"), "-f", str(REPOSITORY / "docker-compose.yml"), "--env-file", str(env_file), *arguments],
        capture_output=True,
        text=True,
        env={},
        check=False,
    )


@functools.cache
def services(env_file: Path) -> dict[str, Any]:
    """Every service of every profile, merged and interpolated: to be read, not changed."""
    done = compose("--profile", "*", "config", "--format", "json", env_file=env_file)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


class Dockerfile:
    """Stages and what they inherit, of a file whose process instructions are in exec form."""

    def __init__(self, path: Path = REPOSITORY / "Dockerfile") -> None:
        self.parents: dict[str, str] = {}
        self._said: dict[str, dict[str, str]] = {}
        stage = ""
        text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for line in text.replace("\\\n", " ").splitlines():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                parent, _, stage = rest.partition(" AS ")
                self.parents[stage] = parent
                self._said[stage] = {}
            elif word and stage:
                said = self._said[stage]
                said[word] = f"{said[word]} {rest}" if word == "ENV" and word in said else rest

    def said(self, target: str, instruction: str) -> str | None:
        """The rest of the instruction's line, of the stage itself or of the nearest that it is made from."""
        while target in self._said:
            if instruction in self._said[target]:
                return self._said[target][instruction]
            target = self.parents[target]
        return None

    def command(self, target: str, instruction: str) -> list[str]:
        """ENTRYPOINT, CMD or HEALTHCHECK of a target as a list; empty if there is none. The shell form is refused."""
        rest = self.said(target, instruction)
        if rest is None:
            return []
        listed = json.loads(rest[rest.index("[") :])
        assert isinstance(listed, list)
        return listed
