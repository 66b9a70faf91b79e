"""A process that has loaded everything and forks the commands off: each is a real process, without the loading.

One JSON object a line, in and out: `{"command": …, "args": […], "env": {…}, "log": …}` starts one and answers its pid;
`{"pid": …}` answers its exit code (negative for a signal), null while it lives.
It ends, and kills all that it started, with its input. A fork ends without taking its interpreter down: all that was
loaded would be copied to be thrown away.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import embedstream.api.client
import embedstream_producer.cancel_cli
import embedstream_producer.submit
import embedstream_producer.submit_cli
import embedstream_worker.cli
import embedstream_worker.serving
from embedstream import failpoints


def ask(url: str, queue: str, text: str) -> None:
    """A program that wants one vector now."""
    with embedstream.api.client.Client(url, queue) as client:
        print(json.dumps(client.embed(text)[0].tolist()))


COMMANDS: dict[str, Callable[[], object]] = {
    "embed-submit": embedstream_producer.submit_cli.main,
    "embed-cancel": embedstream_producer.cancel_cli.main,
    "embed-worker": embedstream_worker.cli.main,
    "ask": lambda: ask(*sys.argv[1:]),
}


def main() -> None:
    forks, started = multiprocessing.get_context("fork"), dict[int, BaseProcess]()
    for line in iter(sys.stdin.readline, ""):
        order: dict[str, Any] = json.loads(line)
        if "command" in order:
            process = forks.Process(target=become, args=(order,))
            process.start()
            assert process.pid is not None
            started[process.pid] = process
            answer: int | None = process.pid
        else:
            answer = started[order["pid"]].exitcode
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for each in started.values():
        each.kill()


def become(order: dict[str, Any]) -> None:
    """Be the command, to its end."""
    for descriptor, path in ((0, os.devnull), (1, f"{order['log']}.out"), (2, f"{order['log']}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.update(order["env"])
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    sys.argv = [order["command"], *order["args"]]
    COMMANDS[order["command"]]()


if __name__ == "__main__":
    main()
