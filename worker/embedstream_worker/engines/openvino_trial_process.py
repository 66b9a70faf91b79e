"""The process of a trial: converts, compiles and checks one model. See `openvino_trial`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from embedstream.errors import ModelError
from embedstream_worker.engines.checking import CheckFailed
from embedstream_worker.engines.openvino_cache import Cache, NotConvertible
from embedstream_worker.engines.openvino_engine import OpenVinoEngine
from embedstream_worker.engines.openvino_trial import Report, Trial
from embedstream_worker.models import ModelFolder


def main() -> None:
    """A trial on standard input, a report as the last line of standard output."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    trial = msgspec.json.decode(sys.stdin.buffer.read(), type=Trial)
    folder = ModelFolder(Path(trial.folder), trial.name, None, "", trial.needs)
    report = Report()
    for precision in trial.precisions:
        try:
            OpenVinoEngine(folder, precision, trial.fingerprint, Cache(Path(trial.cache)))
            report = Report(precision)
            break
        except CheckFailed as error:
            report = Report(unfit=str(error))
        except NotConvertible as error:
            report = Report(unfit=str(error))
            break
        except ModelError as error:
            report = Report(error=str(error))
            break
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
