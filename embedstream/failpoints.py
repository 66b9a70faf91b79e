"""Named places at which state changes, where a test can break this process: kill it, lose a reply, or stop it.

Off unless the environment variable EMBEDSTREAM_FAILPOINTS gives orders, separated by commas: `commit.before=kill`,
`file.written#2=pause` (at the second pass). An order is carried out once.

    kill   SIGKILL to the process itself
    pause  SIGSTOP to the process itself; whoever gave the order sends SIGCONT
    cut    the server carries out the next command of this thread, then the connection breaks before its reply is
           read; `cut*5` breaks so many in a row, more than the client repeats by itself
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from typing import Any, NamedTuple, TypeVar

import redis

from embedstream.errors import UsageError

C = TypeVar("C")

VARIABLE = "EMBEDSTREAM_FAILPOINTS"

SCRIPTS = (
    "calibrate",
    "cancel",
    "commit",
    "create",
    "drop",
    "finalized",
    "forget",
    "release",
    "renew",
    "reply",
    "request",
    "retire",
    "seal",
    "submit",
    "suspect",
    "take_finalize",
)
"""Adopting is `commit` by a producer."""

CLAIMS = ("claim", "claim_requests", "sweep", "sweep_requests")
"""What is taken from a stream: new entries, and those of expired leases."""

STEPS = (*SCRIPTS, *CLAIMS)
"""The broker passes `<step>.before` and `<step>.after`; of claims, only if something came."""

POINTS = frozenset(
    {
        *(f"{step}.{moment}" for step in STEPS for moment in ("before", "after")),
        "file.written",  # under its temporary name: a shard, its errors, _errors.jsonl, changes, the manifest, the card
        "file.renamed",
        "shard.discarding",
        "shard.discarded",
        "hashes.written",  # some of a shard's rows are in the Redis output
        "forgetting.half",  # an ended job's own keys are gone, the listing still names it
    }
)

_ORDER = re.compile(r"(?P<point>[\w.]+)(?:#(?P<turn>\d+))?=(?P<action>kill|pause|cut)(?:\*(?P<times>\d+))?")


class _Order(NamedTuple):
    action: str
    times: int


_orders: dict[tuple[str, int], _Order] = {}
_passed: Counter[str] = Counter()
_passing = threading.Lock()
_thread = threading.local()


def arm(orders: str) -> None:
    """Take these orders in place of all earlier ones. Raises `UsageError`."""
    found: dict[tuple[str, int], _Order] = {}
    for text in filter(None, orders.split(",")):
        match = _ORDER.fullmatch(text.strip())
        if match is None or match["point"] not in POINTS:
            raise UsageError(f"{VARIABLE}: {text!r}: give POINT[#PASS]=kill|pause|cut[*TIMES], see {__name__}")
        found[match["point"], int(match["turn"] or 1)] = _Order(match["action"], int(match["times"] or 1))
    _passed.clear()
    _orders.clear()
    _orders.update(found)


def reach(point: str) -> None:
    """The process is at this point."""
    if _orders:
        _obey(point)


def reach_step(script: str, moment: str) -> None:
    """The process is before or after a step. One that changes nothing has no points."""
    if _orders and script in SCRIPTS:
        _obey(f"{script}.{moment}")


def breakable(client: C) -> C:
    """The client, whose replies get lost where `cut` orders it."""
    if _orders:
        whole: Any = client
        parse = whole.parse_response

        def parse_or_lose(connection: Any, *args: Any, **options: Any) -> Any:
            reply = parse(connection, *args, **options)
            left = getattr(_thread, "cuts", 0)
            if left:
                _thread.cuts = left - 1
                connection.disconnect()
                raise redis.ConnectionError("the reply was lost, as a failpoint ordered")
            return reply

        whole.parse_response = parse_or_lose
    return client


def _obey(point: str) -> None:
    if point not in POINTS:
        raise ValueError(f"failpoint {point} is not declared")
    with _passing:
        _passed[point] += 1
        order = _orders.get((point, _passed[point]))
    if order is None:
        return
    os.write(2, f"failpoint {point}: {order.action}\n".encode())
    match order.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause":
            # To this thread: one sent to the process would stop it a little later, wherever it is then.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "cut":
            _thread.cuts = order.times


arm(os.environ.get(VARIABLE, ""))
