"""Corpora full of traps, and what must come out of each row."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

HARMS = ("slow", "raise", "hang", "exit", "kill", "memory", "nan", "device")
"""Faults of the hashing engine that a text can ask for."""

LASTING = {
    "raise": {"engine_error"},
    "exit": {"poison"},
    "kill": {"poison"},
    "memory": {"out_of_memory"},
    "nan": {"not_finite"},
    "device": {"poison"},
}
"""Codes of the error row that a text must become which does harm whenever it is embedded."""

PASSING = ("raise", "hang", "exit", "kill", "memory", "nan", "device")
"""Harms that happen once. The text that does them alone in a batch may be blamed; else it must come out."""

BLAMED = {"engine_error", "out_of_memory", "poison"}
"""What a text is blamed for that happened to be tried alone when something broke."""


@dataclass
class Expected:
    """What must become of a corpus's rows, by the number of their line (from 0)."""

    texts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row -> (id, text): in the dataset, or blamed."""
    failed: dict[int, set[str]] = field(default_factory=dict)
    """Row -> the codes it may have: in the errors, and only there."""


def edit_corpus(path: Path, rng: random.Random, expected: Expected) -> Expected:
    """Leave lines out, move others, and add some; what must become of the rows then."""
    lines: list[tuple[str, tuple[str, str] | None, set[str]]] = [
        (line, expected.texts.get(row), expected.failed.get(row, set()))
        for row, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True))
    ]
    lines = [line for line in lines if rng.random() < 0.9]
    for _ in range(50):
        id, text = f"{path.stem}-new-{rng.randrange(10**9)}", f"a new text {rng.randrange(10**9)}"
        lines.append((json.dumps({"id": id, "text": text}) + "\n", (id, text), set()))
    if rng.random() < 0.5:
        rng.shuffle(lines)
    path.write_text("".join(line for line, _, _ in lines), encoding="utf-8")
    edited = Expected()
    for row, (_, good, codes) in enumerate(lines):
        if good is None:
            edited.failed[row] = codes
        else:
            edited.texts[row] = good
    return edited


def write_corpus(path: Path, rng: random.Random, rows: int, harmful: bool) -> Expected:
    """Texts of uneven length, some of which are slow, or (`harmful`) do worse, and some lines that are no records."""
    expected = Expected()
    words = [f"w{rng.randrange(10**6)}" for _ in range(500)]
    special: dict[int, str] = dict.fromkeys(rng.sample(range(rows), 30), "slow")
    places = [row for row in rng.sample(range(rows), 60) if row not in special]
    for harm in (*LASTING, *(f"{harm}*1" for harm in PASSING), "kill*2", "hang*2") if harmful else ():
        special[places.pop()] = harm
    for refused in ("json", "empty", "text"):
        special[places.pop()] = refused
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            id, text = f"{path.stem}-{row}", " ".join(rng.choices(words, k=rng.randint(1, 60)))
            harm = special.get(row, "")
            if harm == "json":
                expected.failed[row] = {"invalid_json"}
                file.write('{"id": "broken", "text": \n')
                continue
            if harm in ("empty", "text"):
                expected.failed[row] = {"empty_text"} if harm == "empty" else {"text_not_string"}
                file.write(json.dumps({"id": id, "text": "" if harm == "empty" else 7}) + "\n")
                continue
            if harm:
                text = f"{text} [[fault:{harm}]]"
            if harm in LASTING:
                expected.failed[row] = LASTING[harm] | {"poison"}
            else:
                expected.texts[row] = id, text
            file.write(json.dumps({"id": id, "text": text}) + "\n")
    return expected
