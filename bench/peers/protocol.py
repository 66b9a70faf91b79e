"""How the benchmark talks to a contender: one JSON object a line, on standard input and output.

A contender is a long-lived process, loaded once and idle while others are measured. This module and those beside it
run in the peers' environments, so they import nothing of embedstream.

    {"do": "configure", "settings": {...}}   -> {}
    {"do": "run", "texts": 300}              -> {"seconds": 5.1, "tokens": 27000, "computed": 31000}
    {"do": "finish", "vectors": "a.npy"}     -> {"peak_mib": 812.0}
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Contender(Protocol):
    """What is measured. Loading and configuring are not."""

    tokens: int
    """Tokens of all texts so far, special tokens included."""
    computed: int
    """Tokens that the model computed so far, padding included."""

    def configure(self, settings: dict[str, Any]) -> None: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """Vectors [n, dim] in the order of the texts."""


def peak_mib(pid: int | str = "self") -> float:
    """The largest resident set of a process so far, in MiB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def serve(contender: Contender) -> None:
    """Answer commands until standard input ends. The texts are a JSON list in the file named by the last argument."""
    texts: list[str] = json.loads(Path(sys.argv[-1]).read_text("utf-8"))
    # Libraries print: what is left to them is standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    vectors: np.ndarray[Any, Any] = np.empty((0, 0), np.float32)
    print("{}", file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        reply: dict[str, Any] = {}
        match command["do"]:
            case "configure":
                contender.configure(command["settings"])
                contender.embed(texts[:32])  # allocations, kernels chosen at the first call
            case "run":
                contender.tokens = contender.computed = 0
                begun = time.perf_counter()
                vectors = contender.embed(texts[: command["texts"]])
                reply = {"seconds": time.perf_counter() - begun}
                reply |= {"tokens": contender.tokens, "computed": contender.computed}
            case "finish":
                np.save(command["vectors"], np.asarray(vectors, np.float32))
                reply = {"peak_mib": peak_mib()}
        print(json.dumps(reply), file=answers)
    os._exit(0)  # some libraries leave threads behind that never end
