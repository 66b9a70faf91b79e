"""The token budget of a batch on a CPU, by trying: too small wastes calls, too large falls out of the caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

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


def best_budget(engine: Engine, clock: Callable[[], float] = time.perf_counter) -> int:
    """Half, all or twice the engine's own budget, whichever gives most tokens a second. Takes about a second."""
    own = engine.info.batch_tokens
    tokenizer = engine.tokenizer()
    length = int(tokenizer.encode([PASSAGE], engine.info.max_length).lengths[0])
    seconds: dict[int, float] = {}
    budgets = [budget for budget in (own, own // 2, own * 2) if budget >= length]
    if len(budgets) < 2:
        return own
    tokens = tokenizer.encode([PASSAGE] * (budgets[-1] // length), engine.info.max_length)
    batches = {
        budget: gather_batch(tokens, cut_batches(tokens.lengths, budget, engine.info.padded)[0], 0, "document")
        for budget in budgets
    }
    for _ in range(ROUNDS):
        for budget, batch in batches.items():
            begun = clock()
            engine.embed(batch)
            taken = (clock() - begun) / len(batch.ids)
            seconds[budget] = min(taken, seconds.get(budget, np.inf))
    best = min(seconds, key=lambda budget: seconds[budget] * (1.0 if budget == own else 1.0 + MARGIN))
    rates = ", ".join(f"{budget}: {1 / each:,.0f}" for budget, each in sorted(seconds.items()))
    log.info("batches of %d tokens (tokens/s by budget: %s)", best, rates)
    return best
