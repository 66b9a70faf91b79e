"""The flags that the commands share which run for long: what they serve, and how they log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])

_OPTIONS = (
    click.option(
        "--metrics-port",
        type=click.IntRange(min=0, max=65535),
        help="Serve /metrics (Prometheus), /healthz and /readyz; 0: any free port, which is logged. [default: off]",
    ),
    click.option("--metrics-host", default="127.0.0.1", help="Address to serve them at; 0.0.0.0 or :: for all."),
    click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one object a line."),
)


def service_options(command: F) -> F:
    """Adds them; the command takes `metrics_port: int | None`, `metrics_host: str` and `log_format: LogFormat`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
