"""Trying a model in a process of its own, because what compiles it may bring that process down."""

from __future__ import annotations

import logging
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from embedstream.cli.starting import environment, python_command
from embedstream.errors import ModelError
from embedstream_worker.engines.precision import Precision
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # no fault of the model's, perhaps


class Trial(msgspec.Struct):
    """What the other process is asked."""

    folder: str
    name: str
    needs: Trust
    precision: Precision
    fingerprint: str
    cache: str


class Report(msgspec.Struct):
    """What it answers."""

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
    trial = Trial(str(folder.path), folder.name, folder.needs, precision, fingerprint, str(cache))
    ended = subprocess.run(
        python_command("embedstream_worker.engines.openvino_trial_process"),
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
    report = msgspec.json.decode(ended.stdout.splitlines()[-1], type=Report)
    if report.error is not None:
        raise ModelError(report.error)
    return TrialResult(report.unfit, lasting=True)
