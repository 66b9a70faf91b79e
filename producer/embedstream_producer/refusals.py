"""Refused rows on the terminal: the first of a kind in full, the rest as a count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from embedstream.queue.blocks import Refusal
from embedstream.terminal import printable

SHOWN_OF_A_KIND = 3
MESSAGE_CHARACTERS = 1000


class Refusals:
    """Told of every refused row; a part that is read again is not told twice."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._kinds: Counter[str] = Counter()
        self._last: dict[int, int] = {}

    def add(self, part: int, label: str, refusal: Refusal) -> None:
        """`label` is the part's name for people."""
        if refusal.row <= self._last.get(part, -1):
            return
        self._last[part] = refusal.row
        self._kinds[refusal.code] += 1
        if self._kinds[refusal.code] <= SHOWN_OF_A_KIND:
            of = "" if refusal.id is None else f" (id {printable(refusal.id, 60)})"
            self._say(f"{label}:{refusal.row + 1}: {printable(refusal.message, MESSAGE_CHARACTERS)}{of}")

    def summary(self) -> list[str]:
        """One line for each kind of which some were not shown."""
        return [
            f"{count - SHOWN_OF_A_KIND:,} more rows refused: {code} ({count:,} in all; see _errors.jsonl)"
            for code, count in sorted(self._kinds.items())
            if count > SHOWN_OF_A_KIND
        ]
