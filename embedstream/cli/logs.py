"""What long-lived processes log, as text for people or as one JSON object a line for collectors.

A call says what it is about with `extra=about(job, block)`: JSON has it as fields, the message says it anyway.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from embedstream.cli import commands
from embedstream.masking import mask_text
from embedstream.terminal import PrintableFormatter

LogFormat = Literal["text", "json"]

OURS = ("embedstream", "embedstream_worker", "embedstream_coordinator", "embedstream_gateway")
"""Loggers that say what they do; those of libraries say only what is wrong."""

FIELDS = ("job", "part", "block")

_identity: dict[str, str] = {}


def set_up(form: LogFormat) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else PrintableFormatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(form == "json")
    if form == "json":
        sys.excepthook = _log_unexpected
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def _log_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("embedstream").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def identify(**who: str) -> None:
    """Fields that every JSON line of this process has from now on: `queue`, `worker`, `coordinator`, `gateway`."""
    _identity.update(who)


def about(job: str, block: tuple[int, int] | None = None, part: int | None = None) -> dict[str, str]:
    """What a line is about, for `extra`. `block`: part and number; `part`: where it is no block's."""
    fields = {"job": job}
    if block is not None:
        fields["block"] = f"{block[0]}:{block[1]}"
    if part is not None:
        fields["part"] = str(part)
    return fields


def tell_error(message: str) -> None:
    """Why this process ends, in the format of its log."""
    handlers = logging.getLogger().handlers
    if any(isinstance(handler.formatter, JsonFormatter) for handler in handlers):
        logging.getLogger("embedstream").error(message)
    else:
        commands.tell_error(message)


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `message`, `logger`; where they apply `queue`, `worker`, `coordinator`, `job`, `part`,
    `block`, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": mask_text(record.getMessage()),
            "logger": record.name,
            **_identity,
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = mask_text(self.formatException(record.exc_info))
        return json.dumps(line)  # in ASCII, so that no terminal obeys it
