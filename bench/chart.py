"""The first table of a report of `compare.py` as a picture, in SVG.

python bench/chart.py docs/benchmarks.md > docs/benchmarks.svg
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROW = re.compile(r"^\| (?P<name>.+?) \| (?P<median>[\d,]+) \((?P<low>[\d,]+) to (?P<high>[\d,]+)\) \|", re.MULTILINE)
TITLE = re.compile(r"^## (?P<title>Short texts.*)$", re.MULTILINE)
MACHINE = re.compile(
    r"^(?P<processor>[^;\n]+?), (?P<cores>\d+) cores[^;\n]*;.*?(?P<date>\d{4}-\d\d-\d\d);", re.MULTILINE
)

LABELS, BARS, VALUES = 330, 360, 60
"""Widths: of the names, of the longest bar, and of what stands behind it."""
ROW_HEIGHT, BAR_HEIGHT, HEAD, FOOT = 40, 20, 62, 34

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 10.5px; fill: #59636e }
.value { font-variant-numeric: tabular-nums }
.ours { fill: #0969da }
.peer { fill: #8c959f }
.bare { fill: none; stroke: #0969da; stroke-dasharray: 3 2 }
.range { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ours { fill: #4493f8 }
  .peer { fill: #656c76 }
  .bare { stroke: #4493f8 }
  .range { stroke: #f0f6fc }
}
"""


@dataclass(frozen=True)
class Bar:
    """One contender."""

    name: str
    settings: str
    """What stands in brackets behind its name."""
    kind: str
    """ours, peer, or bare: our engine with nothing around it."""
    median: int
    """Texts a second."""
    low: int
    high: int


def bars(report: str) -> list[Bar]:
    """The rows of the first table, in its order. Raises `ValueError` for a report that has none."""
    table = report[_found(TITLE, report).end() :].partition("\n\n| ")[2].partition("\n\n")[0]
    found = []
    for row in ROW.finditer(f"| {table}"):
        name, _, settings = row["name"].replace("`", "").strip("*").partition(" (")
        kind = "ours" if row["name"].startswith("**") else "bare" if name.startswith("bare loop of") else "peer"
        low, median, high = (int(row[each].replace(",", "")) for each in ("low", "median", "high"))
        found.append(Bar(name, settings.removesuffix(")"), kind, median, low, high))
    if not found:
        raise ValueError("the report has no table of short texts")
    return found


def draw(report: str) -> str:
    """The picture, readable on light and on dark ground."""
    rows, machine = bars(report), _found(MACHINE, report)
    most = max(bar.high for bar in rows)
    width, height = LABELS + BARS + VALUES, HEAD + ROW_HEIGHT * len(rows) + FOOT
    title = _found(TITLE, report)["title"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="title">',
        f"<style>{STYLE}</style>",
        '<text id="title" class="title" x="8" y="24">Texts per second (more is better)</text>',
        f'<text class="small" x="8" y="42">{escape(title)}</text>',
    ]
    for at, bar in enumerate(rows):
        y = HEAD + ROW_HEIGHT * at
        long, low, high = (LABELS + BARS * value / most for value in (bar.median, bar.low, bar.high))
        middle = y + BAR_HEIGHT / 2
        lines += [
            f'<text x="8" y="{y + 14}">{escape(bar.name)}</text>',
            f'<rect class="{bar.kind}" x="{LABELS}" y="{y}" width="{long - LABELS:.1f}" height="{BAR_HEIGHT}" rx="2"/>',
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:g}" y2="{middle:g}"/>',
            f'<text class="value" x="{max(long, high) + 8:.1f}" y="{y + 15}">{bar.median:,}</text>',
        ]
        if bar.settings:
            lines.append(f'<text class="small" x="8" y="{y + 28}">{escape(bar.settings)}</text>')
    words = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['date']}. Bars: median over rounds; lines: range."
    )
    return "\n".join([*lines, f'<text class="small" x="8" y="{height - 12}">{escape(words)}</text>', "</svg>", ""])


def _found(pattern: re.Pattern[str], report: str) -> re.Match[str]:
    found = pattern.search(report)
    if found is None:
        raise ValueError(f"the report has no line like {pattern.pattern}")
    return found


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]).read_text("utf-8")), end="")
