"""The table that is printed last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_stages.results import Figure

MOST_CHARACTERS = 10_000
_LONGEST_VALUE = 160
_OF_A_RATE = ("model", "form", "corpus", "what", "stage", "tokens_per_second", "tflops", "padding", "budget")


def table(figures: Sequence[Figure], peak: float | None, most: int = MOST_CHARACTERS) -> str:
    """What went wrong, rates, the other figures, kernels: in `most` characters, of which the last parts go first.

    `peak`: TFLOP/s of the device's matrix products, if known.
    """
    rates = [figure for figure in figures if "tokens_per_second" in figure]
    profiles = [figure for figure in figures if "top" in figure]
    others = [figure for figure in figures if "what" in figure and figure not in rates and figure not in profiles]
    sections = (
        _ends(figures),
        [
            f"FAILED {figure['stage']}: {figure['what']}: {_short(figure['failed'])}"
            for figure in others
            if "failed" in figure
        ],
        _rates(rates, peak),
        [_line(figure) for figure in others if "failed" not in figure],
        [line for figure in profiles for line in _kernels(figure)],
    )
    return _cut("\n\n".join("\n".join(lines) for lines in sections if lines), most)


def _ends(figures: Sequence[Figure]) -> list[str]:
    return [
        f"{figure['stage']}: {_short(figure['ended'])}" + (f" ({figure['seconds']} s)" if "seconds" in figure else "")
        for figure in figures
        if "ended" in figure
    ]


def _rates(rates: Sequence[Figure], peak: float | None) -> list[str]:
    if not rates:
        return []
    head = ["model", "form", "texts", "batch", "M tok/s", "TFLOP/s", "of peak", "padding", ""]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for figure in rates:
        tflops = figure.get("tflops")
        cells = [
            *(str(figure[name]) for name in ("model", "form", "corpus")),
            str(figure.get("budget", "")),
            f"{figure['tokens_per_second'] / 1e6:.3f}",
            "" if tflops is None else f"{tflops:,.4g}",
            "" if tflops is None or not peak else f"{tflops / peak:.0%}",
            f"{figure['padding']:.1%}",
            _pairs({name: value for name, value in figure.items() if name not in _OF_A_RATE}),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _line(figure: Figure) -> str:
    values = {name: value for name, value in figure.items() if name not in ("stage", "what")}
    return f"{figure['stage']}: {_short(figure['what'])}" + (f": {_pairs(values)}" if values else "")


def _kernels(figure: Figure) -> list[str]:
    rest = {name: value for name, value in figure.items() if name not in ("stage", "what", "top")}
    return [f"{figure['what']}: {_pairs(rest)}", *(f"  {share:6.1%}  {name}" for name, share in figure["top"])]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items() if value is not None)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    more = "\n… the rest is in results.jsonl"
    return text[: text.rindex("\n", 0, most - len(more))] + more
