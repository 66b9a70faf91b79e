"""The contenders of `make bench`, all behind one face: start, run as often as asked, finish."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from environments import PLACE, python_of
from fleet import Server, Worker, submit
from peers.protocol import peak_mib

Settings = dict[str, Any]
Vectors = npt.NDArray[np.float32]

GRAPHS = {"onnx_loop": [".onnx"], "st_onnx": ["-onnx"], "fastembed_embed": ["-onnx"]}
"""Peers that keep a model's graphs between runs, and how the name of the file or folder ends."""


@dataclass(frozen=True)
class Run:
    """One run over the whole corpus."""

    seconds: float
    tokens: int
    computed: int
    """Padding included; 0 if the contender does not say."""


@dataclass(frozen=True)
class Task:
    """What everybody embeds: a model folder, and the texts as a JSON list and as JSON lines."""

    folder: Path
    texts: Path
    corpus: Path
    work: Path
    count: int


class Contender(Protocol):
    name: str

    def start(self, task: Task) -> None: ...

    def run(self) -> Run: ...

    def finish(self) -> tuple[Vectors, float]:
        """Vectors of the last run in the order of the texts; the most memory ever held, in MiB. Ends the process."""


class Peer:
    """A process that speaks `peers/protocol.py`."""

    def __init__(self, name: str, script: str, environment: str | None, settings: Settings) -> None:
        """`environment`: see `environments.python_of`; None is the project's own."""
        self.name = name
        self.settings = settings
        self._script = script
        self._environment = environment

    def start(self, task: Task) -> None:
        """Raises `NotInstalled`, and `SystemExit` if it does not run."""
        python = Path(sys.executable) if self._environment is None else python_of(self._environment)
        graph = [
            str(PLACE / f"{task.folder.name}-{task.folder.parent.name}{end}") for end in GRAPHS.get(self._script, [])
        ]
        self._work = task.work
        self._log = task.work / f"{self._script}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"peers.{self._script}", str(task.folder), *graph, str(task.texts)],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        self._answer()
        self.configure(self.settings)

    def configure(self, settings: Settings) -> None:
        """Also runs a few texts, so that the next run is a warm one."""
        self.settings = settings
        self._ask({"do": "configure", "settings": settings})

    def run(self, texts: int | None = None) -> Run:
        return Run(**self._ask({"do": "run", "texts": texts}))

    def finish(self) -> tuple[Vectors, float]:
        path = self._work / f"{self._script}-vectors.npy"
        peak = float(self._ask({"do": "finish", "vectors": str(path)})["peak_mib"])
        self.stop()
        vectors: Vectors = np.load(path)
        return vectors, peak

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise SystemExit(f"{self.name} ended:\n" + "\n".join(last))
        answer: dict[str, Any] = json.loads(line)
        return answer


class EndToEnd:
    """embedstream in fleet mode: Redis, a warm worker process, `embed-submit`; JSON lines in, Parquet and manifest out.

    The time is the job's own, from its creation to its manifest.
    """

    def __init__(self, dtype: str, server: Server) -> None:
        self.name = f"**embedstream, end to end, {dtype}**"
        self._dtype = dtype
        self._server = server
        self._runs = 0

    def start(self, task: Task) -> None:
        self._task = task
        self._queue = f"{self._dtype}-{task.work.name}"
        self._worker = Worker(
            self._server, task.work, str(task.folder), self._queue, "--dtype", self._dtype, "--engine", "openvino"
        )

    def run(self) -> Run:
        self._runs += 1
        self._output = self._task.work / f"{self._queue}-{self._runs}"
        report = submit(self._server, self._task.corpus, self._output, str(self._task.folder), self._queue)
        if report["rows"] != self._task.count:
            raise SystemExit(f"{self.name}: {report['rows']} rows of {self._task.count}")
        return Run(report["seconds"], report["tokens"], round(report["tokens"] / (1 - report["padding"])))

    def finish(self) -> tuple[Vectors, float]:
        peak = peak_mib(self._worker.pid)
        self._worker.stop()
        manifest = json.loads((self._output / "_manifest.json").read_text())
        paths = [self._output / shard["file"] for shard in manifest["shards"]]
        rows = pq.read_table(paths, columns=["row", "embedding"])
        embedded: Any = rows["embedding"].combine_chunks()
        vectors: Vectors = embedded.flatten().to_numpy().reshape(len(rows), -1)
        order = np.argsort(rows["row"].to_numpy())
        shutil.rmtree(self._output)
        return vectors[order], peak
