"""What `docker compose` would run, as processes of this machine: same commands, same environment, real Redis.

Three things stand in for what containers have: a service's host name becomes 127.0.0.1 and a free port, the place where
a volume is mounted becomes a folder, and the port of the metrics is a free one for each process. All else is taken from
the compose file (as compose itself reads it) and from the Dockerfile.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from e2e.harness import environment, wait_until
from lab.redis_servers import free_port

from deploy.images import Dockerfile, services
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

BIN = Path(sys.executable).parent
MODEL = "hashing"


def seconds(duration: str) -> float:
    """A duration as compose writes it: 1m40s."""
    found = re.findall(r"(\d+)(ms|s|m|h)", duration)
    assert found, duration
    return sum(int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in found)


@dataclass
class Container:
    """One process of a service."""

    service: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    folder: str
    log: Path


@dataclass
class Stack:
    """The compose project: services that are brought up, scaled and stopped."""

    root: Path
    env_file: Path
    extra: dict[str, str] = field(default_factory=dict)
    """Variables for every process: faults to inject, windows small enough for several workers."""

    def __post_init__(self) -> None:
        self.services = copy.deepcopy(services(self.env_file))
        self.dockerfile = Dockerfile()
        self.ports: dict[str, int] = {}
        self.containers: list[Container] = []

    def here(self, service: str, text: str) -> str:
        """A word of a command or of the environment, with hosts and folders as they are on this machine."""
        text = text.replace("$$", "$")  # as compose escapes what is left to the container
        for volume in self.services[service].get("volumes", []):
            if "source" not in volume:  # its own, and empty: a folder of this machine does as well
                continue
            source = volume["source"] if volume["type"] == "bind" else str(self.root / "volumes" / volume["source"])
            text = re.sub(rf"(?<![\w/.]){re.escape(volume['target'])}(?=/|\s|$)", source, text)
        for host, port in self.ports.items():
            text = re.sub(rf"(?<=[@/]){re.escape(host)}:\d+", f"127.0.0.1:{port}", text)
        return text

    def command(self, service: str, arguments: list[str] | None = None) -> list[str]:
        """Entry point and arguments of a service; `arguments` replace its command, as with `docker compose run`."""
        said = self.services[service]
        target = said.get("build", {}).get("target", "")
        entry = said.get("entrypoint") or self.dockerfile.command(target, "ENTRYPOINT")
        rest = arguments or said.get("command") or self.dockerfile.command(target, "CMD")
        assert isinstance(entry, list), f"{service}: not in exec form"
        assert isinstance(rest, list), f"{service}: not in exec form"
        return [self.here(service, word) for word in [*entry, *rest]]

    def environment(self, service: str) -> dict[str, str]:
        """Of a service's processes. A variable without a value is the tester's own, and left out."""
        given = self.services[service].get("environment", {})
        made = {name: self.here(service, value) for name, value in given.items() if value is not None}
        for name in ("EMBEDSTREAM_METRICS_PORT", "EMBEDSTREAM_SERVE_PORT"):
            if name in made:
                made[name] = str(free_port())
        home = {"HOME": str(self.root / "volumes" / "models")}
        return environment(**home, **made, **self.extra, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")

    def start(self, service: str, arguments: list[str] | None = None) -> Container:
        """One container more of a service."""
        made = self.environment(service)
        folder = self.here(service, self.services[service].get("working_dir", str(self.root)))
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(made["HOME"]).mkdir(parents=True, exist_ok=True)
        log = self.root / f"{service}-{len(self.containers)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(self.command(service, arguments), env=made, cwd=folder, stdout=file, stderr=file)
        container = Container(service, process, made, folder, log)
        self.containers.append(container)
        return container

    def start_redis(self) -> None:
        """The only service whose command gets words of ours: where it listens, and where its volume is."""
        port = free_port()
        folder = self.root / "volumes" / "redis"
        folder.mkdir(parents=True)
        command = [*self.command("redis"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self.services["redis"]["command"] = command
        self.start("redis")
        self.ports["redis"] = port
        wait_until(lambda: self.healthy(self.containers[-1]), "redis healthy")

    def healthy(self, container: Container) -> bool:
        """The health check of a container, run as its engine would run it."""
        assert container.process.poll() is None, container.log.read_text()
        return self.check(container).returncode == 0

    def check(self, container: Container) -> subprocess.CompletedProcess[str]:
        said = self.services[container.service]
        target = said.get("build", {}).get("target", "")
        test = said.get("healthcheck", {}).get("test") or ["CMD", *self.dockerfile.command(target, "HEALTHCHECK")]
        command = ["sh", "-c", test[1]] if test[0] == "CMD-SHELL" else test[1:]
        assert command, f"{container.service} has no health check"
        if command[0] == "sh":
            command[2] = command[2].replace("redis-cli", f"redis-cli -p {self.port(container)}")
        return self.execute(container, *command)

    def execute(self, container: Container, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec`."""
        return subprocess.run(
            command, env=container.environment, cwd=container.folder, capture_output=True, text=True, check=False
        )

    def port(self, container: Container) -> str:
        words = self.services[container.service]["command"]
        return str(words[words.index("--port") + 1])

    def scale(self, service: str, count: int) -> list[Container]:
        """`docker compose up --scale service=count`: starts what is missing, stops what is too much."""
        alive = self.alive(service)
        for container in alive[count:]:
            self.stop(container)
        started = [self.start(service) for _ in range(count - len(alive))]
        for container in started:
            wait_until(partial(self.is_ready, container), f"{service} ready ({container.log})")
        return started

    def alive(self, service: str) -> list[Container]:
        return [each for each in self.containers if each.service == service and each.process.poll() is None]

    def is_ready(self, container: Container) -> bool:
        assert container.process.poll() is None, container.log.read_text()
        return any(w.pid == container.process.pid and w.state == "ready" for w in self.broker.workers())

    def stop(self, container: Container) -> int:
        """SIGTERM, and the service's grace; the exit code. It must be enough."""
        container.process.send_signal(signal.SIGTERM)
        return container.process.wait(seconds(self.services[container.service].get("stop_grace_period", "10s")))

    def run(self, service: str, *arguments: str, timeout: float = 120) -> tuple[int, str]:
        """`docker compose run --rm service arguments`: its exit code, and all that it said."""
        container = self.start(service, list(arguments))
        code = container.process.wait(timeout)
        return code, container.log.read_text()

    @property
    def url(self) -> str:
        return self.environment("submit")["EMBEDSTREAM_REDIS_URL"]

    @property
    def broker(self) -> Broker:
        return Broker(connect(self.url), MODEL)

    def close(self) -> None:
        for container in reversed(self.containers):
            if container.process.poll() is None:
                container.process.kill()
            container.process.wait()


def write_env(path: Path, **values: Any) -> Path:
    """An .env file."""
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return path


@contextlib.contextmanager
def stack(root: Path, extra: dict[str, str] | None = None, **env: str) -> Iterator[Stack]:
    """A project with Redis up, a password, and the hashing model; `env` is added to its .env file."""
    env |= {"REDIS_PASSWORD": "s3cretWord", "EMBEDSTREAM_MODEL": MODEL, "EMBEDSTREAM_DATA": str(root / "data")}
    (root / "data").mkdir()
    made = Stack(root, write_env(root / "env", **env), extra or {})
    try:
        made.start_redis()
        yield made
    finally:
        made.close()
