"""How much work a worker takes at once: enough to sort it and never to wait for more, and no more than that.

What one worker holds, no other can do: a worker that is added in the middle of a job finds what the others left.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from embedstream.machine import memory_bytes

LEAST_FULL_WINDOW_TOKENS = 131_072
BATCHES_PER_FULL_WINDOW = 8
"""A full window holds so many batches, or so many tokens if that is more: on a fast device it is over in a second."""

WINDOW_SECONDS = 10.0
"""On a slow one a window is as much as the model does in so long ..."""

LEAST_SORTED_BATCHES = 16
"""... but of an engine that pads at least so many batches: docstrings sorted by 16, 8, 4 are padded by 6, 10, 17 %."""

LEAD_SECONDS = 2.0
"""The next window is claimed when so much is left to compute: it is there and tokenized before the model needs it."""

WINDOWS_IN_MEMORY = 16
"""A window takes at most this part of the memory that there is, by its texts and their results: three are under way at
once, beside the model and the shards."""

MEMORY_SECONDS = 10.0
"""The pace is that of so many last seconds in the model: texts get longer, machines get busy."""


class Ahead:
    """What is claimed and not computed, and how long the model takes for it. Shared between threads."""

    def __init__(
        self,
        batch_tokens: int,
        padded: bool,
        tokens_per_second: float = 0.0,
        window_tokens: int | None = None,
        row_bytes: int = 0,
        token_bytes: int = 0,
    ) -> None:
        """`tokens_per_second`: a first estimate, 0: none. `window_tokens`: the size of a window, if it is fixed.
        `row_bytes`, `token_bytes`: what the results of a row take, and of each of its tokens.
        """
        self._most_bytes = memory_bytes() / WINDOWS_IN_MEMORY
        self._row_bytes, self._token_bytes = row_bytes, token_bytes
        self._full = window_tokens or max(LEAST_FULL_WINDOW_TOKENS, BATCHES_PER_FULL_WINDOW * batch_tokens)
        self._least = window_tokens or batch_tokens * (LEAST_SORTED_BATCHES if padded else 1)
        self._lock = threading.Lock()
        self._on_the_way = 0.0
        self._in_the_model: Callable[[], float] = lambda: 0.0
        self._seconds, self._tokens = (1.0, tokens_per_second) if tokens_per_second else (0.0, 0.0)
        self._busy = 0.0

    def told_by(self, in_the_model: Callable[[], float]) -> None:
        """Who says how many tokens of begun windows are left to compute."""
        self._in_the_model = in_the_model

    def claimed(self, tokens: float) -> None:
        """A window is on its way to the model; `tokens` by estimate."""
        with self._lock:
            self._on_the_way += tokens

    def arrived(self, tokens: float) -> None:
        """It is there, or was handed back; `tokens` as it was claimed with."""
        with self._lock:
            self._on_the_way -= tokens

    def computed(self, tokens: int, busy_seconds: float) -> None:
        """A batch came back. `busy_seconds`: how long the device was at work until now, all in all."""
        with self._lock:
            since, self._busy = busy_seconds - self._busy, busy_seconds
            kept = math.exp(-since / MEMORY_SECONDS)
            self._seconds = self._seconds * kept + since
            self._tokens = self._tokens * kept + tokens

    @property
    def tokens_per_second(self) -> float:
        """What the model does while it is at work; 0 if that is not known yet."""
        with self._lock:
            return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def window_tokens(self) -> int:
        """Estimated tokens of the next window."""
        pace = self.tokens_per_second
        return min(self._full, max(self._least, int(pace * WINDOW_SECONDS))) if pace else self._full

    def memory_share(self, rows: int, tokens: float, other_bytes: int) -> float:
        """What part of a window's memory so many rows take, 1: all of it. `other_bytes`: beside their results."""
        return (rows * self._row_bytes + tokens * self._token_bytes + other_bytes) / self._most_bytes

    def enough(self) -> bool:
        """Whether the next window can wait. One is claimed at a time until the first batch shows how fast it goes."""
        with self._lock:
            tokens = self._on_the_way
        tokens += self._in_the_model()
        return tokens > self.tokens_per_second * LEAD_SECONDS
