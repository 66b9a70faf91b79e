"""What live workers say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Quantity = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""What workers say comes out of Redis: sums and shares of it must stay numbers."""


class InHand(msgspec.Struct, frozen=True, array_like=True):
    """Work that a worker has computed and not committed yet: for showing progress, never for counting."""

    rows: Count = 0
    tokens: Count = 0
    padded: Count = 0

    def __add__(self, other: InHand) -> InHand:
        return InHand(self.rows + other.rows, self.tokens + other.tokens, self.padded + other.padded)


class Rate(msgspec.Struct, frozen=True, array_like=True):
    """What a worker computes per second, lately."""

    rows: Quantity = 0.0
    tokens: Quantity = 0.0

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.rows + other.rows, self.tokens + other.tokens)


class Given(msgspec.Struct, frozen=True, array_like=True):
    """A kind of results that a worker's model gives."""

    dim: Count
    """Of a vector, or of each token's; the size of the vocabulary for sparse ones; how many labels there are."""
    normalized: bool = False


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a live worker says of itself."""

    name: str
    host: str
    pid: Count
    model: str
    fingerprint: str
    engine: str
    device: str
    dtype: str
    roots: tuple[str, ...]
    state: str
    """starting, ready or draining."""
    phase: str = ""
    """What it is doing while it starts, such as `loading its model`; empty once it is ready."""
    phase_seconds: Quantity = 0.0
    started: Quantity
    warm_up_seconds: Quantity = 0.0
    outputs: dict[str, Given] = {}
    """What its model gives, by kind; empty while it is not loaded."""
    max_length: Count = 0
    """Tokens of a text, special tokens included; 0 while the model is not loaded."""
    pooling: str = ""
    """How a vector is made of its tokens', in sentence-transformers' words; empty: in a way of its own."""
    rows: Count = 0
    tokens: Count = 0
    lease_seconds: Quantity = 0.0
    in_hand: dict[str, InHand] = {}
    """By job."""
    written: dict[str, Count] = {}
    """Rows that it has committed, by job, of those that are still worked on."""
    rates: dict[str, Rate] = {}
    """By job; none for jobs on which it does not work at the moment."""
    refused: dict[str, str] = {}
    """Jobs that it will never work on, and why."""
    waits: dict[str, str] = {}
    """Jobs that it cannot work on at present, and why."""
    remarks: dict[str, str] = {}
    """What is to be known of its jobs, by job: which prompt is in front of their texts, or that there should be one."""


def in_hand_of(job: str, workers: Iterable[WorkerRecord], written: Mapping[str, int]) -> InHand:
    """What live workers have computed of a job and not committed.

    `written`: the job's rows by worker, asked for after `workers`: what was committed since they spoke is not in hand.
    """
    speaking = [worker for worker in workers if job in worker.in_hand]
    return sum(
        (_left(w.in_hand[job], written.get(w.name, 0) - w.written.get(job, 0)) for w in speaking),
        InHand(),
    )


def _left(said: InHand, committed: int) -> InHand:
    if not said.rows or committed <= 0:
        return said
    share = max(0, said.rows - committed) / said.rows
    return InHand(*(round(share * count) for count in (said.rows, said.tokens, said.padded)))
