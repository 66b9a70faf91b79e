"""The hashing engine with faults on chosen texts, for tests and for programs that break things on purpose.

A text that holds `[[fault:KIND]]` does harm whenever it is embedded, one with `[[fault:KIND*N]]` only the first N
times; `[[fault:tokenize-KIND]]` does it in the tokenizer already (slow, raise, hang, exit, kill). The vectors are those
of the same text without faults. Kinds:

    slow    takes 0.2 s
    raise   an error of the engine
    hang    never comes back
    exit    the process ends at once
    kill    the same by SIGKILL, as when the machine has no memory left
    memory  the device has no memory for the batch
    nan     a vector of NaN
    device  the device is lost: from now on nothing works in this process

Each strike adds one byte to a file in the folder FAULTY_ENGINE_STRIKES, named `<KIND>-<hash of the text>`: all
processes count together.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import OutOfMemory, Results, TokenBatch, Tokens
from embedstream_worker.engines.hashing import HashingEngine, HashingTokenizer

SLOW_SECONDS = 0.2

_FAULT = re.compile(r"\[\[fault:(?P<stage>tokenize-)?(?P<kind>[a-z]+)(?:\*(?P<times>\d+))?\]\]")


def load(_options: EngineOptions) -> FaultyHashingEngine:
    """The entry point."""
    return FaultyHashingEngine(Path(os.environ["FAULTY_ENGINE_STRIKES"]))


class DeviceError(RuntimeError):
    """What a framework raises once its device is lost."""


class FaultyTokenizer(HashingTokenizer):
    """Looks for faults in the texts before it tokenizes them."""

    def __init__(self, strikes: Path) -> None:
        self._strikes = strikes

    def encode(self, texts: Sequence[str], max_length: int, firsts: Sequence[str] | None = None) -> Tokens:
        for text in texts:
            fault = _FAULT.search(text)
            if fault is not None and fault["stage"] and strike(fault, text, self._strikes):
                break_down(fault["kind"])
        return super().encode(texts, max_length, firsts)


class FaultyHashingEngine(HashingEngine):
    """Looks for faults in the texts of a batch before and after it embeds them."""

    def __init__(self, strikes: Path, dim: int = 384) -> None:
        """`strikes`: the folder in which faults are counted."""
        super().__init__(dim)
        self._strikes = strikes
        self._lost = False

    def tokenizer(self) -> HashingTokenizer:
        return FaultyTokenizer(self._strikes)

    def run(self, batch: TokenBatch) -> Results:
        if self._lost:
            raise DeviceError("the device is lost")
        nan: list[int] = []
        for row, text in enumerate(_texts(batch)):
            fault = _FAULT.search(text)
            if fault is None or fault["stage"] or not strike(fault, text, self._strikes):
                continue
            if fault["kind"] == "nan":
                nan.append(row)
            elif fault["kind"] == "device":
                self._lost = True
                raise DeviceError("device-side assert triggered")
            else:
                break_down(fault["kind"])
        vectors = super().run(batch)
        vectors["dense"][nan] = np.nan
        return vectors


def strike(fault: re.Match[str], text: str, folder: Path) -> bool:
    """Whether a fault still happens; counts it."""
    path = folder / f"{fault['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        struck = os.fstat(descriptor).st_size
        if fault["times"] is not None and struck >= int(fault["times"]):
            return False
        os.write(descriptor, b".")
    finally:
        os.close(descriptor)
    return True


def break_down(kind: str) -> None:
    """Do what a fault does. Raises `OutOfMemory`, `RuntimeError`, or does not return."""
    match kind:
        case "slow":
            time.sleep(SLOW_SECONDS)
        case "hang":
            threading.Event().wait()
        case "exit":
            os._exit(70)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            raise OutOfMemory("a text asked for it")
        case _:
            raise RuntimeError(f"a text asked for the fault {kind}")


def _texts(batch: TokenBatch) -> list[str]:
    """Its texts, whose bytes the tokens are; none at all if no fault is among them."""
    content = batch.ids.tobytes()
    if b"[[fault:" not in content:
        return []
    starts = batch.offsets * 4
    return [content[start:end].rstrip(b"\0").decode(errors="replace") for start, end in pairwise(starts)]
