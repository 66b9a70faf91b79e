"""Engines for tests and measurements, found by their entry points as those of any installed package.

`lab_engines-1.dist-info` beside this folder makes it one, for processes that have `tests` on their path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_PATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def faulty(strikes: Path) -> dict[str, Any]:
    """The environment of a worker that does harm when a text asks for it, and counts that in the folder `strikes`."""
    return {"EMBEDSTREAM_ENGINE": "faulty", "FAULTY_ENGINE_STRIKES": str(strikes), "PYTHONPATH": _PATH}


def paced(tokens_per_second: int) -> dict[str, Any]:
    """The environment of a worker whose device computes so many tokens a second."""
    return {
        "EMBEDSTREAM_ENGINE": "paced",
        "PACED_ENGINE_TOKENS_PER_SECOND": str(tokens_per_second),
        "PYTHONPATH": _PATH,
    }


def drifting() -> dict[str, Any]:
    """The environment of a worker that computes another vector each time."""
    return {"EMBEDSTREAM_ENGINE": "drifting", "PYTHONPATH": _PATH}
