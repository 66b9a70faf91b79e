"""Trying a model in a process of its own, because what compiles it may bring that process down."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from embedstream.errors import ModelError
from embedstream.starting import environment, python_command
from embedstream_worker.engines.precision import Precision
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # no fault of the model's, perhaps


class _Trial(msgspec.Struct):
    folder: str
    name: str
    needs: Trust
    precision: Precision
    fingerprint: str
    cache: str


class _Report(msgspec.Struct):
    unfit: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class TrialResult:
    """What a trial found."""

    unfit: str | None
    """Why this engine cannot run the model; None if it can."""
    lasting: bool
    """Whether another trial would find the same."""


def run_trial(folder: ModelFolder, precision: Precision, fingerprint: str, cache: Path) -> TrialResult:
    """Convert, compile and check a model in another process, leaving what it converted in the cache.

    Raises:
        ModelError: the model cannot be loaded by any engine.
    """
    log.info("model %s: converting for openvino, once", folder.name)
    trial = _Trial(str(folder.path), folder.name, folder.needs, precision, fingerprint, str(cache))
    ended = subprocess.run(
        python_command("embedstream_worker.engines.openvino_trial"),
        env=environment(),
        input=msgspec.json.encode(trial),
        capture_output=True,
        check=False,
    )
    if ended.returncode < 0:
        died_of = signal.Signals(-ended.returncode)
        return TrialResult(f"a trial in {precision} died of {died_of.name}", died_of not in _FROM_OUTSIDE)
    if ended.returncode > 0:
        last = (ended.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        return TrialResult(f"a trial in {precision} failed ({last})", lasting=False)
    report = msgspec.json.decode(ended.stdout.splitlines()[-1], type=_Report)
    if report.error is not None:
        raise ModelError(report.error)
    return TrialResult(report.unfit, lasting=True)


def main() -> None:
    """The other process: a trial on standard input, a report as the last line of standard output."""
    # Here, not above: the engine itself imports this module.
    from embedstream_worker.engines.checking import CheckFailed
    from embedstream_worker.engines.openvino_cache import Cache, NotConvertible
    from embedstream_worker.engines.openvino_engine import OpenVinoEngine

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    trial = msgspec.json.decode(sys.stdin.buffer.read(), type=_Trial)
    folder = ModelFolder(Path(trial.folder), trial.name, None, "", trial.needs)
    try:
        OpenVinoEngine(folder, trial.precision, Cache(Path(trial.cache))).open(trial.precision, trial.fingerprint)
        report = _Report()
    except (NotConvertible, CheckFailed) as error:
        report = _Report(unfit=str(error))
    except ModelError as error:
        report = _Report(error=str(error))
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
