"""Loading a model with OpenVINO after a process of its own has tried it: what compiles it may end that process."""

from __future__ import annotations

import importlib.util
import logging
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import openvino

from embedstream.cli.starting import environment, python_command
from embedstream.errors import ModelError
from embedstream_worker.engines.checking import CheckFailed
from embedstream_worker.engines.openvino_cache import Cache, NotConvertible
from embedstream_worker.engines.openvino_engine import (
    CALIBRATORS,
    CONVERTERS,
    HeadedOpenVinoEngine,
    OpenVinoEngine,
    key_of,
)
from embedstream_worker.engines.phases import CONVERTING, phase
from embedstream_worker.engines.precision import Dtype, Precision, cpu_has_bfloat16, cpu_name
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import ModelFolder

log = logging.getLogger(__name__)

_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # no fault of the model's, perhaps


class Trial(msgspec.Struct):
    """What the other process is asked."""

    folder: str
    name: str
    needs: Trust
    precisions: list[Precision]
    """To be tried in this order, until one is right."""
    fingerprint: str
    cache: str


class Report(msgspec.Struct):
    """What it answers."""

    precision: Precision | None = None
    """The one that is right."""
    unfit: str | None = None
    """Why there is none."""
    error: str | None = None
    """Why no engine can load the model."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial found."""

    report: Report
    lasting: bool
    """Whether another trial would find the same."""


class EngineUnfit(ModelError):
    """OpenVINO cannot run this model rightly on this machine; another engine may."""


def load_openvino(folder: ModelFolder, dtype: Dtype = "auto", cache: Cache | None = None) -> OpenVinoEngine:
    """An engine whose model has passed a trial here.

    The trial converts, too: so this process needs no torch, and never holds the original's weights.

    Raises:
        EngineUnfit: the model does not convert, or its vectors are wrong.
        ModelError: the model cannot be loaded.
    """
    if dtype == "int8" and folder.headed:
        raise ModelError(f"--dtype int8: is for models of one dense vector, and {folder.name} is none; leave it out")
    precisions, fingerprint, cache = _pick_precisions(dtype), folder.fingerprint(), cache or Cache()
    try:
        precision = _require_trial(folder, precisions, fingerprint, cache)
        made = HeadedOpenVinoEngine if folder.headed else OpenVinoEngine
        return made(folder, precision, fingerprint, cache, tried=True)
    except (NotConvertible, CheckFailed) as error:
        cache.close()
        raise EngineUnfit(f"openvino does not run model {folder.name} ({error}); torch does") from error


def _require_trial(folder: ModelFolder, precisions: Sequence[Precision], fingerprint: str, cache: Cache) -> Precision:
    """The first precision with which the model has passed a trial, now or before. Raises `NotConvertible`."""
    parts = key_of(fingerprint, f"trial {' '.join(precisions)} {cpu_name()}", (*CONVERTERS, *CALIBRATORS))
    verdict = cache.verdict(parts)
    try:
        report = msgspec.json.decode(verdict or "", type=Report)
    except msgspec.DecodeError:  # none, or not whole
        result = run_trial(folder, precisions, fingerprint, cache.folder)
        report = result.report
        if result.lasting:
            cache.remember(parts, msgspec.json.encode(report).decode())
    if report.precision is None:
        raise NotConvertible(report.unfit or "")
    return report.precision


def _pick_precisions(wanted: Dtype) -> Sequence[Precision]:
    if wanted == "int8" and importlib.util.find_spec("nncf") is None:
        raise ModelError("--dtype int8: nncf, which calibrates it, is not installed; pip install 'embedstream[cpu]'")
    if wanted != "auto":
        return (wanted,)
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") and cpu_has_bfloat16()
    return ("bfloat16", "float32") if native else ("float32",)


def run_trial(folder: ModelFolder, precisions: Sequence[Precision], fingerprint: str, cache: Path) -> TrialResult:
    """Convert, compile and check a model in another process, leaving what it converted in the cache.

    Raises:
        ModelError: the model cannot be loaded by any engine.
    """
    phase(CONVERTING)
    log.info("model %s: converting for openvino, once", folder.name)
    trial = Trial(str(folder.path), folder.name, folder.needs, [*precisions], fingerprint, str(cache))
    ended = subprocess.run(
        python_command("embedstream_worker.engines.openvino_trial_process"),
        env=environment(),
        input=msgspec.json.encode(trial),
        capture_output=True,
        check=False,
    )
    if ended.returncode < 0:
        died_of = signal.Signals(-ended.returncode)
        report = Report(unfit=f"a trial in {' and '.join(precisions)} died of {died_of.name}")
        return TrialResult(report, died_of not in _FROM_OUTSIDE)
    if ended.returncode > 0:
        last = (ended.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        return TrialResult(Report(unfit=f"a trial in {' and '.join(precisions)} failed ({last})"), lasting=False)
    report = msgspec.json.decode(ended.stdout.splitlines()[-1], type=Report)
    if report.error is not None:
        raise ModelError(report.error)
    return TrialResult(report, lasting=True)
