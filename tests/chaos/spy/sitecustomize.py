"""Loaded by every Python process of the chaos: notes what the broker's steps answer and how often blocks come.

One line an answer (`commit COMMITTED`) or delivery (`delivery 2`) is appended to the file that CHAOS_SPY names. A line
is one write, so lines of many processes do not mix.
"""

from __future__ import annotations

import os
import signal
from typing import Any


def watch(path: str) -> None:
    from embedstream.queue.broker import Broker

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    run, claim, sweep = Broker.run, Broker.claim, Broker.sweep

    def spied_run(self: Any, step: Any) -> Any:
        answer = run(self, step)
        code = getattr(answer, "code", None)
        if code is not None:
            os.write(file, f"{step.script} {code}\n".encode())
        return answer

    def spied(taking: Any) -> Any:
        def take(self: Any, *args: Any, **options: Any) -> Any:
            taken = taking(self, *args, **options)
            lines = "".join(f"delivery {claimed.deliveries}\n" for claimed in taken)
            if lines:
                os.write(file, lines.encode())
            return taken

        return take

    Broker.run = spied_run  # type: ignore[method-assign]
    Broker.claim = spied(claim)  # type: ignore[method-assign]
    Broker.sweep = spied(sweep)  # type: ignore[method-assign]


if os.environ.get("CHAOS_SPY"):
    # Ctrl-C while native modules are loaded shall end the process, not run through them as an exception.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    watch(os.environ["CHAOS_SPY"])
    signal.signal(signal.SIGINT, before)
