"""Where figures go the moment they are known: a line of JSON each, on disk when `note` returns."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
"""`stage`, and either `ended` with `seconds`, the last one of a stage, or `what` was measured and what came out."""

OK = "ok"
"""How a stage ended that did all it had to do."""


class Results:
    """One file of figures, shared by the processes of a run, of which one writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, stage: str, **figure: Any) -> None:
        """Append a figure. It outlives this process, and the machine's next crash."""
        line = json.dumps({"stage": stage, **figure}, default=str) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())

    def read(self) -> list[Figure]:
        """All figures, in the order in which they came."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()] if self.path.exists() else []

    def forget(self, stages: Collection[str]) -> None:
        """Drop what an earlier run found of these stages."""
        kept = [figure for figure in self.read() if figure["stage"] not in stages]
        self.path.write_text("".join(json.dumps(figure) + "\n" for figure in kept))

    def find(self, stage: str, **wanted: Any) -> list[Figure]:
        """The figures of a stage that have all of these values."""
        return [
            figure
            for figure in self.read()
            if figure["stage"] == stage and all(figure.get(name) == value for name, value in wanted.items())
        ]
