"""How fast a model is, and with which batches: on a CPU too small ones waste calls, too large ones leave the caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import Engine

log = logging.getLogger(__name__)

PASSAGE = "a passage of about a hundred words, as long as those that most corpora are made of, " * 6
"""The text that is tried."""

ROUNDS = 3
"""Alternating, so that a machine that gets busy does not decide; the best of each counts."""

MARGIN = 0.05
"""By how much another budget must be faster to replace the engine's own: noise is of that size."""


MOST_SECONDS = 3.0
"""No round is begun after so long: what a call costs is nothing beside a batch of a model that is as slow as that."""


class Trial(NamedTuple):
    """What came of it."""

    batch_tokens: int
    tokens_per_second: float
    """With these batches; 0 if that was not tried."""


def try_budgets(engine: Engine, budgets: Sequence[int], clock: Callable[[], float] = time.perf_counter) -> Trial:
    """Which budget gives most tokens a second; the first one, unless another is clearly better.

    With one budget a batch is run; with three this takes about a second. Raises what `run` raises.
    """
    first = budgets[0]
    tokenizer = engine.tokenizer()
    length = int(tokenizer.encode([PASSAGE], engine.info.max_length).lengths[0])
    usable = [budget for budget in budgets if budget >= length]
    if first not in usable:
        return Trial(first, 0.0)
    tokens = tokenizer.encode([PASSAGE] * (max(usable) // length), engine.info.max_length)
    batches = {
        budget: gather_batch(tokens, cut_batches(tokens.lengths, budget, engine.info.padded)[0], 0, "document")
        for budget in usable
    }
    seconds: dict[int, float] = {}
    ends = clock() + MOST_SECONDS
    for _ in range(ROUNDS if len(usable) > 1 else 1):
        if seconds and clock() > ends:
            break
        for budget, batch in batches.items():
            begun = clock()
            engine.run(batch)
            taken = (clock() - begun) / len(batch.ids)
            seconds[budget] = min(taken, seconds.get(budget, np.inf))
    best = min(seconds, key=lambda budget: seconds[budget] * (1.0 if budget == first else 1.0 + MARGIN))
    rates = ", ".join(f"{budget}: {1 / each:,.0f}" for budget, each in sorted(seconds.items()))
    log.info("batches of %d tokens (tokens/s by budget: %s)", best, rates)
    return Trial(best, 1 / seconds[best])
