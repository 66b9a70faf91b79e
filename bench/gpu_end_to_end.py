"""The GPU benchmark's last part: a corpus from JSON lines through Redis and a worker process into Parquet."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT, ROOT / "producer", ROOT / "worker")
"""What has to be on the path where the project is not installed."""

_NEEDED = ("redis", "msgspec", "click", "rich", "pyarrow")
_READY_SECONDS = 180.0


class Skipped(Exception):
    """This machine lacks something that the end-to-end run needs."""


@dataclass(frozen=True)
class EndToEnd:
    """One job."""

    rows: int
    seconds: float
    """From the start of `embed-submit` to its end, when the manifest is written; the worker was ready before."""
    server: str
    worker: str
    """What the worker said of its engine."""


def run(
    folder: Path,
    texts: Sequence[str],
    scratch: Path,
    device: str,
    redis_server: str | None,
    options: Sequence[str] = (),
) -> EndToEnd:
    """Embed the texts with one worker. Raises `Skipped`, with the reason."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"the packages {', '.join(missing)} are not installed here")
    from embedstream.broker import Broker
    from embedstream.connection import connect
    from embedstream.embedded.lock import OutputLock
    from embedstream.embedded.programs import ask_version, find_program
    from embedstream.embedded.server import PrivateServer
    from embedstream.errors import ServerError

    program = ask_version(redis_server) if redis_server else None
    if redis_server and program is None:
        raise Skipped(f"{redis_server} is no Redis server that runs here")
    try:
        program = program or find_program()
    except ServerError as error:
        raise Skipped(f"no redis-server: {error}; or name one with --redis-server PATH") from error
    corpus = scratch / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(row), "text": text}) + "\n" for row, text in enumerate(texts))
    log = scratch / "worker.log"
    with OutputLock(str(scratch / "server")) as lock, PrivateServer.start(lock, program=program) as server:
        queue = "gpu"
        command = [
            sys.executable,
            "-m",
            "embedstream_worker",
            "--engine",
            "torch",
            "--queue",
            queue,
            "--device",
            device,
        ]
        places = ["--model", str(folder), "--redis", server.url, "--output-root", str(scratch)]
        with log.open("wb") as errors:
            worker = subprocess.Popen([*command, *places, *options], env=_environment(), stderr=errors)
        try:
            broker, end = Broker(connect(server.url), queue), time.monotonic() + _READY_SECONDS
            while not any(found.pid == worker.pid and found.state == "ready" for found in broker.workers()):
                if worker.poll() is not None or time.monotonic() > end:
                    raise Skipped(f"the worker did not get ready:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            begun = time.perf_counter()
            submit = [sys.executable, "-c", "from embedstream_producer.submit_cli import main; main()", str(corpus)]
            job = ["-o", str(scratch / "vectors"), "--redis", server.url, "--queue", queue, "--model", str(folder)]
            done = subprocess.run(
                [*submit, *job, "--quiet", "--json"], env=_environment(), capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - begun
        finally:
            worker.terminate()
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
    if done.returncode:
        raise Skipped(f"embed-submit ended with {done.returncode}:\n{done.stderr[-2000:]}\n{log.read_text()[-2000:]}")
    return EndToEnd(len(texts), seconds, f"{program.product} {program.version}", log.read_text().strip())


def _environment() -> dict[str, str]:
    """This process's own, without settings of the person who measures, and with the project on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDSTREAM_")}
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
