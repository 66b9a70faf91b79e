"""The budget that a short trial on a CPU finds."""

from __future__ import annotations

import pytest

from embedstream_worker.engines.base import EngineInfo, Results, TokenBatch
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.probe import try_budgets


class ClockedEngine(HashingEngine):
    """Takes as long for a batch as it is told, on a clock of its own."""

    def __init__(self, seconds_per_token: dict[int, float]) -> None:
        super().__init__(dim=8)
        self._seconds = seconds_per_token
        self.now = 0.0

    def run(self, batch: TokenBatch) -> Results:
        size = min(self._seconds, key=lambda budget: abs(budget - len(batch.ids)))
        self.now += self._seconds[size] * len(batch.ids)
        return super().run(batch)


def own_budget() -> int:
    info: EngineInfo = HashingEngine(dim=8).info
    return info.batch_tokens


@pytest.mark.parametrize(
    ("half", "own", "twice", "chosen"),
    [(0.5, 1.0, 2.0, 0.5), (2.0, 1.0, 0.5, 2), (1.0, 1.0, 1.0, 1), (0.97, 1.0, 0.97, 1)],
)
def test_the_fastest_budget_is_chosen_and_noise_changes_nothing(
    half: float, own: float, twice: float, chosen: float
) -> None:
    budget = own_budget()
    engine = ClockedEngine({budget // 2: half, budget: own, budget * 2: twice})
    assert try_budgets(engine, (budget, budget // 2, budget * 2), clock=lambda: engine.now).batch_tokens == int(
        budget * chosen
    )
